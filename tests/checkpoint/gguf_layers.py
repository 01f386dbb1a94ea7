"""The tensors and keys of small GGUF files of architectures whose layers differ, as llama.cpp has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.checkpoint.gguf_layer_norms import CENTERED, outer_shapes

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

VOCABULARY, HIDDEN, INNER, WIDE, NARROW, HEAD = 320, 128, 256, 128, 64, 32
EXPERTS, EXPERT_SIZE = 6, 64
_ATTENTION = {
    "attn_q.weight": (WIDE, HIDDEN),
    "attn_k.weight": (NARROW, HIDDEN),
    "attn_v.weight": (NARROW, HIDDEN),
    "attn_output.weight": (HIDDEN, WIDE),
}
_MLP = {"ffn_gate.weight": (INNER, HIDDEN), "ffn_up.weight": (INNER, HIDDEN), "ffn_down.weight": (HIDDEN, INNER)}
_INPUT_NORMS = {"attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,)}
_OUTPUT_NORMS = {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
_HEAD_NORMS = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
_WIDTH_NORMS = {"attn_q_norm.weight": (WIDE,), "attn_k_norm.weight": (NARROW,)}
_ROUTED: Shapes = {
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_gate_exps.weight": (EXPERTS, EXPERT_SIZE, HIDDEN),
    "ffn_up_exps.weight": (EXPERTS, EXPERT_SIZE, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT_SIZE),
    "exp_probs_b.bias": (EXPERTS,),
}
_SHARED: Shapes = {
    "ffn_gate_shexp.weight": (2 * EXPERT_SIZE, HIDDEN),
    "ffn_up_shexp.weight": (2 * EXPERT_SIZE, HIDDEN),
    "ffn_down_shexp.weight": (HIDDEN, 2 * EXPERT_SIZE),
}
_EXPERT_VALUES = {
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "expert_feed_forward_length": EXPERT_SIZE,
    "expert_shared_count": 2,
    "leading_dense_block_count": 1,
}
_WINDOW = {"attention.sliding_window": 12}


def _llama(index: int) -> Shapes:
    return {**_ATTENTION, **_MLP, **_INPUT_NORMS}


def _cohere2(index: int) -> Shapes:
    return {**_ATTENTION, **_MLP, "attn_norm.weight": (HIDDEN,)}


def _exaone4(index: int) -> Shapes:
    return {**_ATTENTION, **_MLP, **_OUTPUT_NORMS, **_HEAD_NORMS}


def _olmo3(index: int) -> Shapes:
    return {**_ATTENTION, **_MLP, **_OUTPUT_NORMS, **_WIDTH_NORMS}


def _lfm2(index: int) -> Shapes:
    if index % 2:
        return {**_ATTENTION, **_MLP, **_INPUT_NORMS, **_HEAD_NORMS}
    convolution = {"shortconv.conv.weight": (HIDDEN, 3), "shortconv.in_proj.weight": (3 * HIDDEN, HIDDEN)}
    return {**convolution, "shortconv.out_proj.weight": (HIDDEN, HIDDEN), **_MLP, **_INPUT_NORMS}


def _ernie(index: int) -> Shapes:
    return {**_ATTENTION, **_INPUT_NORMS, **(_ROUTED | _SHARED if index else _MLP)}


def _granite(index: int) -> Shapes:
    sizes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    experts: Shapes = {f"ffn_{part}_exps.weight": (EXPERTS, *size) for part, size in sizes.items()}
    return {**_ATTENTION, **_INPUT_NORMS, **experts, "ffn_gate_inp.weight": (EXPERTS, HIDDEN)}


def _granite_shared(index: int) -> Shapes:
    return {**_granite(index), **_SHARED}


def _glm(index: int) -> Shapes:
    biases = {f"attn_{part}.bias": (size,) for part, size in (("q", WIDE), ("k", NARROW), ("v", NARROW))}
    norms = {"attn_norm.weight": (HIDDEN,), "post_attention_norm.weight": (HIDDEN,)}
    found = {**_ATTENTION, **biases, **norms, **_HEAD_NORMS, **(_ROUTED | _SHARED if index else _MLP)}
    if index == 3:
        found |= {"nextn.eh_proj.weight": (HIDDEN, 2 * HIDDEN)}
        found |= {f"nextn.{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm", "shared_head_norm")}
    return found


def _gemma4(index: int) -> Shapes:
    wide, inner = (HEAD, INNER) if index % 2 == 0 else (2 * HEAD, INNER)
    inner = 2 * INNER if index > 1 else inner
    found: Shapes = {"attn_q.weight": (4 * wide, HIDDEN), "attn_output.weight": (HIDDEN, 4 * wide)}
    found |= {f"attn_{part}.weight": (2 * wide, HIDDEN) for part in "kv"}
    found |= {f"attn_{part}_norm.weight": (wide,) for part in "qk"}
    found |= {"ffn_gate.weight": (inner, HIDDEN), "ffn_up.weight": (inner, HIDDEN), "ffn_down.weight": (HIDDEN, inner)}
    found |= {"inp_gate.weight": (32, HIDDEN), "proj.weight": (HIDDEN, 32), "post_norm.weight": (HIDDEN,)}
    return {**found, **_INPUT_NORMS, **_OUTPUT_NORMS, "layer_output_scale.weight": (1,)}


_GRANITE_VALUES = {
    "expert_count": EXPERTS,
    "expert_used_count": 2,
    "attention.scale": 0.25,
    "embedding_scale": 3.0,
    "residual_scale": 0.5,
    "logit_scale": 4.0,
}
# The layers of each architecture, and its keys without its name; None removes a common key. What follows a colon tells
# files of one architecture apart.
LAYERED: Mapping[str, tuple[Callable[[int], Shapes], Mapping[str, Any]]] = {
    "mistral3": (
        _llama,
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.3,
        },
    ),
    "cohere2": (
        _cohere2,
        {
            **_WINDOW,
            "logit_scale": 0.25,
            "attention.layer_norm_epsilon": 1e-5,
            "attention.layer_norm_rms_epsilon": None,
        },
    ),
    "exaone4": (_exaone4, {}),
    "olmo2:windows": (_olmo3, _WINDOW),
    "ernie4_5": (_llama, {}),
    "ernie4_5-moe": (
        _ernie,
        {**_EXPERT_VALUES, "interleave_moe_layer_step": 1, "expert_shared_feed_forward_length": 2 * EXPERT_SIZE},
    ),
    "gemma4": (
        _gemma4,
        {
            "feed_forward_length": [INNER, INNER, 2 * INNER, 2 * INNER],
            "attention.head_count_kv": [2, 2, 2, 2],
            "attention.sliding_window_pattern": [True, False, True, False],
            "attention.sliding_window": 12,
            "attention.shared_kv_layers": 2,
            **{f"attention.{part}_length": 2 * HEAD for part in ("key", "value")},
            **{f"attention.{part}_length_swa": HEAD for part in ("key", "value")},
            "rope.dimension_count": 2 * HEAD,
            "rope.dimension_count_swa": HEAD,
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 1e4,
            "embedding_length_per_layer_input": 32,
            "final_logit_softcapping": 3.0,
        },
    ),
    "lfm2": (_lfm2, {"attention.head_count_kv": [0, 2, 0, 2], "shortconv.l_cache": 3}),
    "granitemoe": (_granite, _GRANITE_VALUES),
    "granitemoe:shared": (
        _granite_shared,
        {**_GRANITE_VALUES, "expert_shared_feed_forward_length": 2 * EXPERT_SIZE, "rope.scaling.finetuned": True},
    ),
    "glm4moe": (
        _glm,
        {
            **_EXPERT_VALUES,
            "expert_gating_func": 2,
            "expert_weights_scale": 1.5,
            "expert_weights_norm": True,
            "nextn_predict_layers": 1,
            "rope.dimension_count": HEAD // 2,
        },
    ),
    **CENTERED,
}
_TIED = ("cohere2", "ernie4_5", "ernie4_5-moe", "gemma4", "lfm2")


def shapes_of(architecture: str) -> Shapes:
    """The shapes of all tensors of a model of four layers."""
    layer, _ = LAYERED[architecture]
    if architecture in CENTERED:
        return outer_shapes(architecture) | _numbered(layer)
    found: Shapes = {"token_embd.weight": (VOCABULARY, HIDDEN)}
    found["token_embd_norm.weight" if architecture == "lfm2" else "output_norm.weight"] = (HIDDEN,)
    if architecture not in _TIED:
        found["output.weight"] = (VOCABULARY, HIDDEN)
    if architecture == "gemma4":
        found |= {"per_layer_token_embd.weight": (VOCABULARY, 4 * 32), "per_layer_model_proj.weight": (4 * 32, HIDDEN)}
        found |= {"per_layer_proj_norm.weight": (32,), "rope_freqs.weight": (HEAD,)}
    return found | _numbered(layer)


def _numbered(layer: Callable[[int], Shapes]) -> Shapes:
    return {f"blk.{index}.{name}": shape for index in range(4) for name, shape in layer(index).items()}
