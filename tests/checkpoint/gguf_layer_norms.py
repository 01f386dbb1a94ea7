"""The tensors and keys of small GGUF files of architectures with LayerNorm, as llama.cpp has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

VOCABULARY, HIDDEN, INNER, WIDE, NARROW, HEAD, CONTEXT = 320, 128, 256, 128, 64, 32, 128
EXPERTS = 4
_EPS = {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None}
_QUARTER = {"rope.dimension_count": HEAD // 4}


def _norm(name: str) -> Shapes:
    return {f"{name}_norm.weight": (HIDDEN,), f"{name}_norm.bias": (HIDDEN,)}


def _with_biases(matrices: Shapes) -> Shapes:
    return {**matrices, **{name.replace(".weight", ".bias"): shape[:1] for name, shape in matrices.items()}}


_QKV = {"attn_q.weight": (WIDE, HIDDEN), "attn_k.weight": (NARROW, HIDDEN), "attn_v.weight": (NARROW, HIDDEN)}
_OUTPUT = {"attn_output.weight": (HIDDEN, WIDE)}
_PLAIN = {"ffn_up.weight": (INNER, HIDDEN), "ffn_down.weight": (HIDDEN, INNER)}
_GATED = {"ffn_gate.weight": (INNER, HIDDEN), **_PLAIN}
_FUSED = {"attn_qkv.weight": (3 * WIDE, HIDDEN), **_OUTPUT, **_PLAIN}


def _stablelm(index: int) -> Shapes:
    return {**_with_biases(_QKV), **_OUTPUT, **_GATED, **_norm("attn"), **_norm("ffn")}


def _stablelm_parallel(index: int) -> Shapes:
    return {**_QKV, **_OUTPUT, **_GATED, **_norm("attn")}


def _fused(index: int) -> Shapes:
    return {**_with_biases(_FUSED), **_norm("attn"), **_norm("ffn")}


def _phi2(index: int) -> Shapes:
    return {**_with_biases({**_QKV, **_OUTPUT, **_PLAIN}), **_norm("attn")}


def _phi2_fused(index: int) -> Shapes:
    return {**_with_biases({"attn_qkv.weight": (WIDE + 2 * NARROW, HIDDEN), **_OUTPUT, **_PLAIN}), **_norm("attn")}


def _nemotron(index: int) -> Shapes:
    return {**_QKV, **_OUTPUT, **_PLAIN, **_norm("attn"), **_norm("ffn")}


def _nemotron_biases(index: int) -> Shapes:
    return {**_with_biases({**_QKV, **_OUTPUT, **_PLAIN}), **_norm("attn"), **_norm("ffn")}


def _phimoe(index: int) -> Shapes:
    experts = {f"ffn_{part}_exps.weight": (EXPERTS, INNER, HIDDEN) for part in ("gate", "up")}
    experts |= {"ffn_down_exps.weight": (EXPERTS, HIDDEN, INNER), "ffn_gate_inp.weight": (EXPERTS, HIDDEN)}
    return {**_with_biases({**_QKV, **_OUTPUT}), **experts, **_norm("attn"), **_norm("ffn")}


# The layers of each architecture, and its keys without its name; None removes a common key. What follows a colon tells
# files of one architecture apart.
CENTERED: Mapping[str, tuple[Callable[[int], Shapes], Mapping[str, Any]]] = {
    "stablelm": (_stablelm, {**_EPS, **_QUARTER, "use_parallel_residual": True}),
    "stablelm:parallel": (_stablelm_parallel, {**_EPS, **_QUARTER}),
    "gpt2": (_fused, {**_EPS, "attention.head_count_kv": None}),
    "gptneox": (
        _fused,
        {**_EPS, **_QUARTER, "attention.head_count_kv": None, "use_parallel_residual": True},
    ),
    "gptneox:sequential": (
        _fused,
        {**_EPS, **_QUARTER, "attention.head_count_kv": None, "use_parallel_residual": False},
    ),
    "phi2": (_phi2, {**_EPS, **_QUARTER}),
    "phi2:fused": (_phi2_fused, {**_EPS, **_QUARTER}),
    "nemotron": (_nemotron, {**_EPS, "rope.dimension_count": HEAD // 2, "rope.scaling.type": "none"}),
    "nemotron:biases": (
        _nemotron_biases,
        {
            **_EPS,
            "rope.dimension_count": HEAD // 2,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 4.0,
        },
    ),
    "phimoe": (_phimoe, {"expert_count": EXPERTS, "expert_used_count": 2}),
}


def outer_shapes(name: str) -> Shapes:
    """The shapes of the tensors outside the layers of one of `CENTERED`."""
    architecture = name.partition(":")[0]
    found: Shapes = {"token_embd.weight": (VOCABULARY, HIDDEN), **_norm("output")}
    if architecture != "gpt2":
        found["output.weight"] = (VOCABULARY, HIDDEN)
    if architecture in ("phi2", "phimoe"):
        found["output.bias"] = (VOCABULARY,)
    if architecture == "gpt2":
        found["position_embd.weight"] = (CONTEXT, HIDDEN)
    return found
