"""Metadata and tensors of GGUF files with latent attention and of hybrids: what is refused, and layers that guess."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.engine.check import why_not_run
from entrollm.errors import FormatError, UnsupportedError
from tests.checkpoint.gguf_converted import KINDS, make_model, tokens, write_file
from tests.support.gguf_sources import GgufSource

Tensor = tuple[str, tuple[int, ...], int, bytes]
TOKENS = tokens()


@functools.cache
def original(name: str) -> GgufSource:
    """The file of a small model."""
    kind = KINDS[name]
    model = make_model(kind, len(TOKENS["tokenizer.ggml.tokens"]))
    return write_file(kind, model, is_quantized=False, tokens=TOKENS)


def opened(
    folder: Path,
    name: str,
    values: dict[str, Any] | None = None,
    change: Callable[[Tensor], Tensor | None] | None = None,
) -> Checkpoint:
    """The file with other values and tensors."""
    source = original(name)
    prefix = f"{KINDS[name].architecture}."
    tensors = source.tensors if change is None else [new for each in source.tensors if (new := change(each))]
    changed = source.values | {prefix + key: value for key, value in (values or {}).items()}
    (folder / "model.gguf").write_bytes(GgufSource(changed, tensors).to_bytes())
    return Checkpoint.open(folder / "model.gguf")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("deepseek-v3", "expert_gating_func", 3, "expert_gating_func 3 is not implemented"),
        ("deepseek-v3", "attention.temperature_scale", 0.5, "attention.temperature_scale 0.5 is not implemented"),
        ("deepseek-v3", "rope.scaling.attn_factor", 0.5, "rope.scaling.attn_factor 0.5 is not implemented"),
        ("deepseek-v3", "attention.head_count_kv", 2, "head_count_kv is 2, expected 1, the latent vector that all"),
        ("deepseek-v3-whole", "attention.head_count_kv", 1, "head_count_kv is 1, expected 4, the heads of queries"),
        ("deepseek-v3", "attention.key_length", 99, "key_length is 99, expected 80, the latent vector's features and"),
        ("deepseek-v3", "attention.value_length", 9, "value_length is 9, expected 64, the latent vector's features"),
        ("deepseek-v3", "attention.key_length_mla", 16, "attention.key_length_mla 16 is not implemented"),
        ("mistral4", "attention.temperature_length", 8, "length is 8, expected 16, the original context length"),
        ("qwen35", "rope.dimension_sections", [1, 1, 1, 0], "rope.dimension_sections .* is not implemented"),
        ("qwen35", "ssm.inner_size", 6 * 2**24, "ssm.inner_size 100663296 is not implemented"),
        ("qwen35", "ssm.state_size", 2**30, "ssm.state_size 1073741824 is not implemented"),
        ("granitehybrid", "attention.value_length", 8, "value_length is 8, expected 32, the keys' length"),
        ("granitehybrid", "rope.dimension_count", 8, "dimension_count is 8, expected 32, the heads' length"),
        ("nemotron_h", "attention.value_length", 8, "value_length is 8, expected 32, the keys' length"),
        ("deepseek-v2", "nextn_predict_layers", 1, "nextn_predict_layers 1 is not implemented"),
        ("qwen35", "ssm.time_step_rank", 5, "ssm.time_step_rank 5 is not implemented"),
        ("granitehybrid", "ssm.inner_size", 200, "ssm.inner_size 200 is not implemented"),
        ("granitehybrid", "ssm.time_step_rank", 7, "ssm.time_step_rank 7 is not implemented"),
        ("nemotron_h_moe", "expert_gating_func", 1, "expert_gating_func is 1, expected 2, sigmoids"),
        ("nemotron_h_moe", "nextn_predict_layers", 1, "nextn_predict_layers 1 is not implemented; it should be 0"),
        ("nemotron_h_moe", "moe_latent_size", 32, "the key 'nemotron_h_moe.moe_latent_size' is not known"),
    ],
)
def test_values_that_are_not_implemented(name: str, key: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        opened(tmp_path, name, {key: value})


@pytest.mark.parametrize("name", ["gemma3n", "mamba2", "falcon-h1", "lfm2moe"])
def test_architectures_that_the_engine_lacks(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(GgufSource({"general.architecture": name}).to_bytes())
    with pytest.raises(UnsupportedError, match=f"architecture '{name}' is not supported; supported are llama"):
        Checkpoint.open(tmp_path / "model.gguf")


def without(end: str) -> Callable[[Tensor], Tensor | None]:
    return lambda tensor: None if tensor[0].endswith(end) else tensor


def as_blocks(end: str, *shape: int) -> Callable[[Tensor], Tensor]:
    content = bytes(math.prod(shape) // 32 * 34)
    return lambda tensor: (tensor[0], shape, 8, content) if tensor[0].endswith(end) else tensor


def as_zeros(end: str, *shape: int, kind: int = 0) -> Callable[[Tensor], Tensor]:
    content = np.zeros(shape, np.float32 if kind == 0 else np.float16).tobytes()
    return lambda tensor: (tensor[0], shape, kind, content) if tensor[0].endswith(end) else tensor


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("deepseek-v3", without("0.attn_v_b.weight"), "is there without the layer's 'attn_v_b.weight'"),
        ("deepseek-v3", without("0.attn_k_b.weight"), "is there without the layer's 'attn_k_b.weight'"),
        ("deepseek-v3", as_zeros("attn_v_b.weight", 2, 32, 64), r"attn_k_b.weight' has shape .*those of 4 heads"),
        (
            "qwen35",
            as_zeros("attn_qkv.weight", 64, 128),
            r"qkv.weight' has shape \[64, 128\], expected 320 rows",
        ),
        ("qwen35", as_zeros("ssm_out.weight", 128, 96), r"ssm_out.weight' has shape .*, expected 192 columns"),
        (
            "granitehybrid",
            as_zeros("ffn_up.weight", 192, 128, kind=1),
            r"ffn_gate.weight' is F32 .* F16 .*expected one type and length of rows",
        ),
        ("granitehybrid", as_blocks("0.ssm_a", 8, 32), r"ssm_a' is Q8_0, expected one of F32, F16, BF16"),
        (
            "granitehybrid-experts",
            as_zeros("0.ffn_up_exps.weight", 2, 192, 128),
            r"blk.0.ffn_up_exps.weight' has 2 experts, and the model 6",
        ),
    ],
)
def test_tensors_that_do_not_fit(name: str, change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        opened(tmp_path, name, change=change)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("granitehybrid", "0.ssm_norm.weight"),
        ("qwen35", "0.post_attention_norm.weight"),
        ("granitehybrid", "0.ssm_conv1d.weight"),
        ("nemotron_h", "0.ssm_conv1d.weight"),
    ],
)
def test_norms_and_kernels_in_blocks_are_refused(name: str, end: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"{end}' is Q8_0; expected one of F32, F16, BF16"):
        opened(tmp_path, name, change=as_blocks(end, 2, 128))


def test_numbers_that_no_model_has(tmp_path: Path) -> None:
    with (
        opened(tmp_path, "granitehybrid", change=as_zeros("ssm_a", 8, 1)) as checkpoint,
        pytest.raises(FormatError, match=r"ssm_a' holds a number that is not below 0; fetch"),
    ):
        checkpoint.read("model.layers.0.mamba.A_log")

    def endless(tensor: Tensor) -> Tensor:
        content = np.full(tensor[1], np.inf, np.float32).tobytes()
        return (*tensor[:3], content) if tensor[0].endswith("attn_v_b.weight") else tensor

    with (
        opened(tmp_path, "deepseek-v3", change=endless) as checkpoint,
        pytest.raises(FormatError, match=r"attn_k_b.weight' or attn_v_b holds a number that is not finite"),
    ):
        checkpoint.read("model.layers.0.self_attn.kv_b_proj.weight")


def test_experts_in_one_stack(tmp_path: Path) -> None:
    """Gate and up projections may be fused."""
    arrays = {each[0]: np.frombuffer(each[3], np.float32).reshape(each[1]) for each in original("deepseek-v3").tensors}

    def fused(tensor: Tensor) -> Tensor | None:
        layer, _, end = tensor[0].rpartition(".ffn_")
        if end == "gate_exps.weight":
            array = np.concatenate([arrays[tensor[0]], arrays[f"{layer}.ffn_up_exps.weight"]], axis=1)
            return (f"{layer}.ffn_gate_up_exps.weight", array.shape, 0, array.tobytes())
        return None if end == "up_exps.weight" else tensor

    with opened(tmp_path, "deepseek-v3", change=fused) as checkpoint:
        for part in ("gate", "up"):
            found = checkpoint.read(f"model.layers.1.mlp.experts.5.{part}_proj.weight")
            assert (found == arrays[f"blk.1.ffn_{part}_exps.weight"][5]).all()


GUESSING = {"eh_proj": (128, 256), "enorm": (128,), "hnorm": (128,), "shared_head_norm": (128,)}


@pytest.mark.parametrize(
    ("name", "offset", "names"),
    [
        ("deepseek-v3", 0, {"model.layers.2.eh_proj", "model.layers.2.enorm", "model.layers.2.shared_head.norm"}),
        ("qwen35moe", 1, {"mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.norm", "mtp.layers.0.self_attn.q_norm"}),
    ],
)
def test_layers_that_guess(name: str, offset: int, names: set[str], tmp_path: Path) -> None:
    source = original(name)
    last = [(each[0].replace("blk.1.", "blk.2."), *each[1:]) for each in source.tensors if "blk.1." in each[0]]
    for part, shape in GUESSING.items():
        last.append((f"blk.2.nextn.{part}.weight", shape, 0, np.full(shape, 3, np.float32).tobytes()))
    prefix = KINDS[name].architecture
    values = source.values | {f"{prefix}.block_count": 3, f"{prefix}.nextn_predict_layers": 1}
    path = tmp_path / "model.gguf"
    path.write_bytes(GgufSource(values, [*source.tensors, *last]).to_bytes())
    with Checkpoint.open(path) as checkpoint:
        assert {f"{each}.weight" for each in names} <= checkpoint.tensors.keys()
        norm = next(each for each in names if each.endswith((".enorm", "_embedding")))
        assert (checkpoint.read_float32(f"{norm}.weight") == 3 - offset).all()
        assert checkpoint.config["num_hidden_layers"] == 2
    assert why_not_run(path) is None


def test_layers_are_linear_as_the_file_says(tmp_path: Path) -> None:
    with opened(tmp_path, "qwen35", {"attention.recurrent_layers": [True, False]}) as checkpoint:
        assert checkpoint.config["layer_types"] == ["linear_attention", "full_attention"]
