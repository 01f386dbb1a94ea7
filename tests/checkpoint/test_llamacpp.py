"""Configuration and token ids of GGUF files, against llama.cpp's own; skipped without llama-cpp-python.

The other project runs in a process of its own, with the interpreter that LLAMACPP_PYTHON names, or this one.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from entrollm.checkpoint.gguf_tokenizer import convert_tokenizer
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.engine.load import load
from tests.checkpoint.gguf_layers import LAYERED
from tests.checkpoint.test_gguf_metadata import scaling, whole
from tests.checkpoint.test_gguf_tokenizer import TEXTS, merges_of, trained, values_of
from tests.support.gguf_sources import GgufSource

PYTHON = os.environ.get("LLAMACPP_PYTHON", sys.executable)
ASK = """
import json, sys
import llama_cpp
from llama_cpp import Llama

path, texts, ids = json.load(sys.stdin)
model = Llama(path, n_ctx=64, verbose=False, logits_all=True, n_threads=1)
raw = llama_cpp.llama_model_get_vocab(model.model)
found = {
    "layers": llama_cpp.llama_model_n_layer(model.model),
    "hidden": llama_cpp.llama_model_n_embd(model.model),
    "heads": llama_cpp.llama_model_n_head(model.model),
    "kv_heads": llama_cpp.llama_model_n_head_kv(model.model),
    "context": llama_cpp.llama_model_n_ctx_train(model.model),
    "rows": llama_cpp.llama_vocab_n_tokens(raw),
    "bos": llama_cpp.llama_vocab_bos(raw),
    "eos": llama_cpp.llama_vocab_eos(raw),
    "ends": [i for i in range(llama_cpp.llama_vocab_n_tokens(raw)) if llama_cpp.llama_vocab_is_eog(raw, i)],
    "tokens": [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts],
}
if ids:
    model.eval(ids)
    found["logits"] = model.scores[: len(ids)].tolist()
print("FOUND" + json.dumps(found))
"""


@functools.cache
def is_installed() -> bool:
    """Whether the other project can be asked."""
    done = subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True)
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not is_installed(), reason="llama-cpp-python is not installed")


def ask(path: Path, texts: list[str], ids: list[int]) -> dict[str, Any]:
    given = json.dumps([str(path), texts, ids])
    done = subprocess.run([PYTHON, "-c", ASK], input=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.partition("FOUND")[2])
    return found


def check_config(path: Path, found: dict[str, Any]) -> None:
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config
    ours = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    theirs = ("layers", "hidden", "heads", "rows")
    assert [config[key] for key in ours] == [found[key] for key in theirs]
    # The first layer's, which may have none.
    assert found["kv_heads"] in (0, config["num_key_value_heads"])
    assert config["max_position_embeddings"] == found["context"]
    if config["bos_token_id"] is not None:
        assert config["bos_token_id"] == found["bos"]
    ends = config["eos_token_id"]
    assert sorted(ends if isinstance(ends, list) else [ends]) == found["ends"]


_BY_TOKEN = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")


def model(values: dict[str, Any], rows: int, architecture: str = "llama") -> GgufSource:
    """The small model with an embedding of so many rows and weights that are not all alike."""
    made = whole(architecture, {**values, "tokenizer.ggml.add_bos_token": values.get("tokenizer.ggml.add_bos_token")})
    generator = np.random.default_rng(3)
    tensors = []
    for name, shape, kind, content in made.tensors:
        if name == "rope_freqs.weight":
            tensors.append((name, shape, kind, content))
            continue
        shape = (rows, *shape[1:]) if name in _BY_TOKEN else shape
        array = 0.2 * generator.standard_normal(shape)
        if "norm" in name:
            # Attention of Gemma 4 has no other scale, and sharp attention enlarges the rounding of keys.
            array = (0.2 if architecture == "gemma4" and "attn_q_norm" in name else 1) * (1 + array / 2)
        tensors.append((name, shape, 0, array.astype(np.float32).tobytes()))
    return GgufSource(made.values, tensors)


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize(
    "pre", ["llama-bpe", "qwen2", "smollm", "gpt-2", "qwen35", "deepseek-v3", "glm4", "dbrx", "refact"]
)
def test_byte_level_tokenizers(pre: str, add_bos: bool | None, tmp_path: Path) -> None:
    original = trained(pre if pre in ("llama-bpe", "qwen2", "smollm") else "gpt-2")
    values = values_of(original, "gpt2", pre=pre, merges=merges_of(original), add_bos_token=add_bos)
    rows = len(values["tokenizer.ggml.tokens"])
    path = tmp_path / "model.gguf"
    path.write_bytes(model(values, rows).to_bytes())
    # Qwen's own tokenizer composes characters first, and so does the converted one; llama.cpp leaves that out.
    texts = [text for text in TEXTS if text and "\u0301" not in text]
    found = ask(path, texts, [])
    check_config(path, found)
    tokenizer = Tokenizer.from_str(convert_tokenizer(path)["tokenizer.json"])
    assert [tokenizer.encode(text).ids for text in texts] == found["tokens"]


@pytest.mark.parametrize(
    ("last", "roles"),
    [
        ((), {"eos": 7}),
        ((), {"eos": 7, "eot": 8, "eom": 9}),
        (("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"), {"eos": -3}),
        (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), {"eos": -1}),
        (("<|endoftext|>", "<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"), {"eos": -5}),
        (("<|return|>", "<|call|>", "<|end|>"), {"eos": 7}),
        (("<|calls|>", "<|flush|>", "<|end|>"), {"eos": 7}),
        (("<end_of_turn>", "<eos>"), {"eos": 7, "fim_sep": 12}),
        (("<|tool_response>",), {"eos": 7}),
        (("<EOT>", "[EOT]", "[EOS]", "[e~[", "[PAD]"), {"eos": 7}),
    ],
)
def test_end_tokens(last: tuple[str, ...], roles: dict[str, int], tmp_path: Path) -> None:
    original = trained("gpt-2")
    values = values_of(original, "gpt2", pre="gpt-2", merges=merges_of(original))
    tokens = [*values["tokenizer.ggml.tokens"], *last]
    types = [*values["tokenizer.ggml.token_type"], *(3 for _ in last)]
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    values |= {f"tokenizer.ggml.{role}_token_id": number % len(tokens) for role, number in roles.items()}
    path = tmp_path / "model.gguf"
    path.write_bytes(model(values, len(tokens)).to_bytes())
    check_config(path, ask(path, [], []))


@pytest.mark.parametrize("begins", [True, False])
def test_sentence_piece_tokenizers(begins: bool, tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["on", "▁t", "im", "er", "ime", "▁time", "▁up", "▁upon", "▁th", "▁the", "▁there", "▁w"]
    scores = [0.0] * 259 + [float(-i) for i in range(12)]
    characters = sorted(set("▁Onceupatim,hrws.dol"))
    scores += [-100.0 - i for i in range(len(characters))]
    pieces += characters
    values = {
        "model": "llama",
        "tokens": pieces,
        "scores": scores,
        "token_type": [2, 3, 3, *(6 for _ in range(256)), *(1 for _ in pieces[259:])],
        "add_space_prefix": begins,
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(model({f"tokenizer.ggml.{key}": v for key, v in values.items()}, len(pieces)).to_bytes())
    texts = ["Once upon a time, there was a child.", "time", " time", "there  there", "é"]
    found = ask(path, texts, [])
    tokenizer = Tokenizer.from_str(convert_tokenizer(path)["tokenizer.json"])
    assert [tokenizer.encode(text).ids for text in texts] == found["tokens"]


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {"llama.attention.sliding_window": 12, "llama.attn_logit_softcapping": 5.0}),
        ("gemma3", {"llama.attention.sliding_window": 12, "llama.final_logit_softcapping": 3.0}),
        ("gemma3", {**scaling(type="linear", factor=4.0), "llama.rope.freq_base": 1e6}),
        ("granite", {"llama.attention.scale": 0.25, "llama.logit_scale": 4.0}),
        ("granite", {"llama.embedding_scale": 3.0, "llama.residual_scale": 0.5, "llama.logit_scale": 1.0}),
        ("smollm3", {}),
        ("olmo2", {}),
        ("seed_oss", {}),
        ("qwen2moe", {}),
        ("qwen3moe", {}),
        ("olmoe", {}),
        ("gpt-oss", {"llama.attention.sliding_window": 12, "llama.attention.key_length": 32}),
        ("phi3", {"llama.rope.dimension_count": 16}),
        ("glm4", {"llama.rope.dimension_count": 16}),
        *((name, {}) for name in LAYERED),
        ("llama", {"llama.rope.scale_linear": 4.0}),
        ("llama", scaling(factor=4.0)),
        ("llama", scaling(type="none", factor=4.0)),
        ("qwen2", scaling(type="yarn", factor=4.0, original_context_length=32)),
        ("qwen3", scaling(type="yarn", factor=4.0, original_context_length=64)),
        ("llama", scaling(type="yarn", factor=2.0)),
        ("qwen2", scaling(type="yarn", factor=4.0, original_context_length=32, attn_factor=0.8)),
    ],
)
def test_logits(architecture: str, values: dict[str, Any], tmp_path: Path) -> None:
    original = trained("gpt-2")
    named = values_of(original, "gpt2", pre="gpt-2", merges=merges_of(original)) | values
    rows = len(named["tokenizer.ggml.tokens"])
    path = tmp_path / "model.gguf"
    path.write_bytes(model(named, rows, architecture).to_bytes())
    ids = np.random.default_rng(9).integers(5, rows, 48).tolist()
    found = ask(path, [], ids)
    check_config(path, found)
    theirs, ours = np.array(found["logits"]), load(path).logits(ids)
    # llama.cpp keeps keys and values in 16 bits.
    assert np.abs(theirs - ours).max() < 0.03 * theirs.std()
