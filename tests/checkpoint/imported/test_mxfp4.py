"""GPT-OSS checkpoints with MXFP4 experts keep their values, on the engine and in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from entrollm import CompressOptions, _core, compress, load
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.export import export
from entrollm.compress.verify import verify
from entrollm.errors import EntroLLMError, FormatError
from entrollm.format.reader import CompressedModel
from entrollm.hf import CodedStack
from entrollm.hf import load as load_plugin
from tests.support.float4_sources import VALUES
from tests.support.quantized_sources import Arrays, change_tensors

HIDDEN, INNER, EXPERTS = 64, 32, 3
CONFIG = {
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "tie_word_embeddings": False,
}
STACK = "model.layers.0.mlp.experts.gate_up_proj"
IDS = [5, 90, 17, 17, 9, 21, 3, 64, 40, 2, 77, 8]


def write_source(folder: Path) -> Path:
    """A checkpoint as openai/gpt-oss-20b is stored, of random bytes."""
    torch.manual_seed(3)
    generator = np.random.default_rng(3)
    config = transformers.GptOssConfig(**CONFIG)  # type: ignore[arg-type]
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = generator.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
        scales = generator.integers(120, 124, blocks.shape[:3], np.uint8)
        tensors |= {name + "_blocks": torch.from_numpy(blocks), name + "_scales": torch.from_numpy(scales)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("mxfp4") / "source")


@pytest.fixture(scope="module")
def coded(source: Path) -> Path:
    compress(source, source.parent / "coded")
    return source.parent / "coded"


@pytest.fixture(scope="module")
def dequantized(source: Path) -> Any:
    """What transformers makes of the checkpoint."""
    options = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=options, dtype="float32")
    return model.eval()


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def test_weights_are_exactly_the_sources(source: Path, coded: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    blocks, scales = (tensors[STACK + part].tolist() for part in ("_blocks", "_scales"))
    with CompressedModel.open(coded) as model, Checkpoint.open(source) as checkpoint:
        assert checkpoint.quantization == "MXFP4" and verify(model, _core.ThreadPool(1), checkpoint).compared
        found = checkpoint.read_float32(STACK + ".1.T")
        assert sum(info.size_bytes for info in checkpoint.tensors.values()) == sum(
            entry.size_bytes for entry in checkpoint.entries.values()
        )
    for row, column in np.ndindex(found.shape):
        octet = blocks[1][row][column // 32][column % 32 // 2]
        bits = octet >> 4 if column % 2 else octet & 15
        value = VALUES[bits & 7] * (-1 if bits & 8 else 1)
        assert found[row, column] == value * 2.0 ** (scales[1][row][column // 32] - 127)


def test_the_engine_computes_what_transformers_does(source: Path, coded: Path, dequantized: Any) -> None:
    wanted = logits(dequantized)
    for path in (source, coded):
        np.testing.assert_allclose(load(path).logits(IDS), wanted, atol=2e-3)


def test_the_plugin_multiplies_with_the_coded_experts(coded: Path, dequantized: Any) -> None:
    model = load_plugin(coded, dtype="float32")
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(stack, CodedStack) and stack.shape == (EXPERTS, HIDDEN, 2 * INNER)
    np.testing.assert_allclose(logits(model), logits(dequantized), atol=2e-3)
    theirs = dequantized.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(stack[1], theirs[1]) and torch.equal(stack.dequantize(), theirs)


def test_an_export_is_an_ordinary_checkpoint(coded: Path, dequantized: Any, tmp_path: Path) -> None:
    with CompressedModel.open(coded) as model:
        export(model, tmp_path / "out", _core.ThreadPool(1))
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32").eval()
    for name, tensor in dequantized.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name


def drop_scales(tensors: Arrays) -> None:
    del tensors[STACK + "_scales"]


def flatten_blocks(tensors: Arrays) -> None:
    tensors[STACK + "_blocks"] = tensors[STACK + "_blocks"].reshape(EXPERTS, -1)


def cut_blocks(tensors: Arrays) -> None:
    tensors[STACK + "_blocks"] = tensors[STACK + "_blocks"][..., :8]


def raise_exponent(tensors: Arrays) -> None:
    tensors[STACK + "_scales"] = np.full_like(tensors[STACK + "_scales"], 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_scales, r"gate_up_proj_scales: expected U8 \[3, 64, 2\], found None"),
        (flatten_blocks, "gate_up_proj_blocks: expected U8 with four axes"),
        (cut_blocks, "gate_up_proj_blocks: expected groups of 16 bytes"),
        (raise_exponent, r"gate_up_proj_scales: a scale is not a number \(exponent 255\)"),
    ],
)
def test_malformed_experts_are_refused(change: Any, message: str, tmp_path: Path, source: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((source / name).read_bytes())
    change_tensors(tmp_path / "model", change)
    with pytest.raises(FormatError, match=message):
        compress(tmp_path / "model", tmp_path / "out")


def test_a_second_quantization_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises((EntroLLMError, ValueError), match="is quantized already"):
        compress(source, tmp_path / "out", CompressOptions(bits=4))
