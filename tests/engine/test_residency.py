"""Experts that are read when they are chosen and given up again, and what a token reads."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from entrollm import CompressOptions, compress, load
from entrollm.cli.token_bytes import describe_token_bytes
from entrollm.engine.residency import Residency
from entrollm.engine.traffic import token_bytes
from entrollm.engine.weights import Floats
from entrollm.format.reader import CompressedModel
from tests.support.paths import TINY_LLAMA

HIDDEN, LAYERS, EXPERTS, INNER = 64, 2, 8, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3-MoE, compressed."""
    path = tmp_path_factory.mktemp("experts")
    config = {"model_type": "qwen3_moe", "vocab_size": 200, "hidden_size": HIDDEN, "intermediate_size": 96}
    config |= {"moe_intermediate_size": INNER, "num_experts": EXPERTS, "num_experts_per_tok": 2, "head_dim": 16}
    config |= {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"max_position_embeddings": 256, "norm_topk_prob": True, "tie_word_embeddings": False}
    random = np.random.default_rng(0)
    tensors: dict[str, Floats] = {"model.norm.weight": np.ones(HIDDEN, np.float32)}

    def add(name: str, rows: int, columns: int) -> None:
        weights = random.standard_normal((rows, columns)) / np.sqrt(columns)
        tensors[f"{name}.weight"] = weights.astype(np.float32)

    add("model.embed_tokens", 200, HIDDEN)
    add("lm_head", 200, HIDDEN)
    for layer in range(LAYERS):
        place = f"model.layers.{layer}."
        for norm, size in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
            tensors[f"{place}{norm}.weight"] = np.ones(size, np.float32)
        for part in "qk":
            tensors[f"{place}self_attn.{part}_norm.weight"] = np.ones(16, np.float32)
        for part, rows, columns in (("q", 64, HIDDEN), ("k", 32, HIDDEN), ("v", 32, HIDDEN), ("o", HIDDEN, 64)):
            add(f"{place}self_attn.{part}_proj", rows, columns)
        add(f"{place}mlp.gate", EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for part, rows, columns in (("gate", INNER, HIDDEN), ("up", INNER, HIDDEN), ("down", HIDDEN, INNER)):
                add(f"{place}mlp.experts.{expert}.{part}_proj", rows, columns)
    source = path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors")
    compress(source, path / "coded", CompressOptions(bits=4))
    return path / "coded"


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_experts_come_and_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the given part of the file is held, chosen experts are read first, and the text stays the same."""
    held: list[str] = []
    sizes: dict[str, int] = {}

    def prefetch(model: CompressedModel, name: str) -> None:
        assert name not in held
        held.append(name)
        sizes[name] = model.tensor_bytes(name)

    def release(model: CompressedModel, name: str) -> None:
        held.remove(name)

    monkeypatch.setattr(CompressedModel, "prefetch", prefetch)
    monkeypatch.setattr(CompressedModel, "release", release)
    with CompressedModel.open(folder) as model:
        experts = sum(model.tensor_bytes(name) for name in model.specs if ".experts." in name)
    others = file_bytes(folder) - experts
    limit = others + experts * 6 // (LAYERS * EXPERTS)  # room for six experts
    limited, free = load(folder, threads=1, memory=limit), load(folder, threads=1, memory="file")
    options = {"max_tokens": 40, "temperature": 1.0, "seed": 1}
    found = limited.generate([1, 2, 3], **options)  # type: ignore[arg-type]
    assert found.token_ids == free.generate([1, 2, 3], **options).token_ids  # type: ignore[arg-type]
    assert 0 < sum(sizes[name] for name in held) <= limit - others
    assert len(sizes) > len(held)  # others were given up
    assert all(".experts." in name for name in sizes)


def test_limits_that_make_no_sense_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 kB of memory are too little: .* take \d+ kB, and four experts up to"):
        load(folder, threads=1, memory=1000)
    with pytest.raises(ValueError, match="is not compressed, and is expanded to float32"):
        load(TINY_LLAMA, memory=10**9)
    compress(TINY_LLAMA, tmp_path / "dense", CompressOptions(bits=4))
    with pytest.raises(ValueError, match="for models with experts, of which a token reads a part; this one has none"):
        load(tmp_path / "dense", memory=10**9)


def test_a_token_reads_its_experts_alone(folder: Path) -> None:
    config = load(folder, threads=1).config
    with CompressedModel.open(folder) as model:
        sizes = {name: model.tensor_bytes(name) for name in (*model.specs, *model.plain)}
    found = token_bytes(config, sizes)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    embedding = sizes["model.embed_tokens.weight"]
    assert found.all_bytes == sum(sizes.values())
    assert found.weight_bytes == pytest.approx(found.all_bytes - embedding - experts * (1 - 2 / EXPERTS), abs=1)
    assert found.cache_bytes == {"f32": 512, "f16": 256, "int8": 160}
    assert describe_token_bytes(found).endswith("each token before: 512 B (f32), 256 B (f16), 160 B (int8)")


class Parts:
    """Stands for a file of experts of one byte."""

    def __init__(self) -> None:
        self.held: list[str] = []

    def tensor_bytes(self, name: str) -> int:
        return 1

    def file_bytes(self) -> int:
        return 40

    def prefetch(self, name: str) -> None:
        time.sleep(1e-5)  # let other threads run
        self.held.append(name)

    def release(self, name: str) -> None:
        time.sleep(1e-5)
        self.held.remove(name)


def test_threads_share_what_is_held() -> None:
    parts = Parts()
    residency = Residency(parts, 24)  # type: ignore[arg-type]
    fetch = residency.fetcher([(str(number),) for number in range(20)])  # and 20 bytes of others
    residency.check()

    def choose(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(100):
            fetch(random.choice(20, 3, replace=False).tolist())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(choose, range(4)))
    assert len(parts.held) == len(set(parts.held)) == 4
    fetch(range(9))  # one layer may choose more than there is room for
    assert len(parts.held) == 9
    fetch([1])
    assert len(parts.held) == 4
