"""The architectures of GGUF files whose norms subtract the mean and add a bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrollm.checkpoint.gguf_architecture import ATTENTION, QKV, Architecture, Values
from entrollm.checkpoint.gguf_changes import Changes, Order, Shape
from entrollm.checkpoint.gguf_mixtures import MIXTRAL, counted_experts
from entrollm.errors import FormatError

_EPS = "attention.layer_norm_epsilon"
# llama.cpp has one approximate GELU for models that name GELU or an approximation of it.
_GELU = "gelu_new"


def _whole_heads(values: Values, config: dict[str, Any], *, shares_keys: bool) -> None:
    """Check that heads share the features evenly, and without `shares_keys` that each has keys of its own."""
    heads = config["num_attention_heads"]
    values.expect("attention.key_length", config["hidden_size"] // heads, "the features that each head has")
    if not shares_keys:
        values.expect("attention.head_count_kv", heads, "the heads, each of which has keys of its own")


def _stablelm(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    _whole_heads(values, config, shares_keys=True)
    return {
        "layer_norm_eps": config["rms_norm_eps"],
        # The key of this name is true in files of models without it.
        "use_parallel_residual": not values.has_tensor("blk.0.ffn_norm.weight"),
    }


def _gpt2(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    _whole_heads(values, config, shares_keys=False)
    return {
        "n_embd": config["hidden_size"],
        "n_inner": config["intermediate_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_positions": config["max_position_embeddings"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "activation_function": _GELU,
    }


def _gptneox(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    _whole_heads(values, config, shares_keys=False)
    rope = config["rope_parameters"]
    return {
        "layer_norm_eps": config["rms_norm_eps"],
        "hidden_act": _GELU,
        "use_parallel_residual": values.flag("use_parallel_residual", True),
        "attention_bias": True,
        "rotary_pct": rope["partial_rotary_factor"],
        "rotary_emb_base": rope["rope_theta"],
    }


def _phi2(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {"layer_norm_eps": config["rms_norm_eps"], "hidden_act": _GELU}


def _nemotron(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {"norm_eps": config["rms_norm_eps"], "hidden_act": "relu2"}


def _phimoe(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    if rope["rope_type"] == "longrope":
        # The file has one factor for both.
        rope = rope | {"short_mscale": rope["attention_factor"], "long_mscale": rope["attention_factor"]}
    return {
        **counted_experts(values, config),
        "rope_parameters": rope,
        "lm_head_bias": values.has_tensor("output.bias"),
    }


@dataclass(frozen=True)
class _ByHead:
    """Fused rows in the order of their heads, which the file has by projection.

    Attributes:
        heads: of attention.
        size: features of a head.
    """

    heads: int
    size: int
    others: tuple[str, ...] = ()
    columns: Order | None = None

    def form(self, kinds: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[str, Shape]:
        """See Change."""
        _check_rows(shapes[0], len(QKV) * self.heads * self.size)
        return kinds[0], shapes[0]

    def apply(self, kinds: tuple[str, ...], arrays: list[NDArray[Any]]) -> NDArray[Any]:
        """See Change."""
        (array,) = arrays
        by_part = array.reshape(len(QKV), self.heads, self.size, *array.shape[1:])
        return np.ascontiguousarray(by_part.swapaxes(0, 1)).reshape(array.shape)


@dataclass(frozen=True)
class _Part:
    """Rows [begin, end) of a fused tensor with `rows` of them."""

    begin: int
    end: int
    rows: int
    others: tuple[str, ...] = ()
    columns: Order | None = None

    def form(self, kinds: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[str, Shape]:
        """See Change."""
        _check_rows(shapes[0], self.rows)
        return kinds[0], (self.end - self.begin, *shapes[0][1:])

    def apply(self, kinds: tuple[str, ...], arrays: list[NDArray[Any]]) -> NDArray[Any]:
        """See Change."""
        return arrays[0][self.begin : self.end]


def _check_rows(shape: Shape, rows: int) -> None:
    if not shape or shape[0] != rows:
        raise FormatError(f"has shape {list(shape)}, expected {rows} rows")


def _by_head(config: Mapping[str, Any]) -> Changes:
    change = _ByHead(config["num_attention_heads"], config["head_dim"])
    return {f"attn_qkv.{kind}": {f"{_NEOX[0]}.{kind}": change} for kind in ("weight", "bias")}


def _apart(config: Mapping[str, Any]) -> Changes:
    wide, narrow = (config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    ends = (0, wide, wide + narrow, wide + 2 * narrow)
    parts = {ours: _Part(ends[at], ends[at + 1], ends[-1]) for at, ours in enumerate(QKV)}
    return {f"attn_qkv.{kind}": {f"{o}.{kind}": part for o, part in parts.items()} for kind in ("weight", "bias")}


_PHI = ("self_attn.dense", "mlp.fc1", "mlp.fc2")
_NEOX = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")

CENTERED: Mapping[str, Architecture] = MappingProxyType(
    {
        "stablelm": Architecture(
            model_type="stablelm",
            class_name="StableLmForCausalLM",
            extend=_stablelm,
            keys=frozenset({"use_parallel_residual"}),
            eps=_EPS,
            rotates_part=True,
            has_norm_biases=True,
            biases={"use_qkv_bias": QKV},
        ),
        "gpt2": Architecture(
            model_type="gpt2",
            class_name="GPT2LMHeadModel",
            extend=_gpt2,
            parts=dict(zip((*_FUSED, "attn_norm", "ffn_norm"), (*_GPT2, "ln_1", "ln_2"), strict=True)),
            # The model's matrices are (in_features, out_features).
            whole_names={f"{a}.weight": f"{b}.weight.T" for a, b in zip(_FUSED, _GPT2, strict=True)},
            layers="transformer.h.",
            outer={
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
            },
            eps=_EPS,
            has_norm_biases=True,
            biases={"": _GPT2},
        ),
        "gptneox": Architecture(
            model_type="gpt_neox",
            class_name="GPTNeoXForCausalLM",
            extend=_gptneox,
            keys=frozenset({"use_parallel_residual"}),
            parts=dict(zip(_FUSED[1:], _NEOX[1:], strict=True)),
            layers="gpt_neox.layers.",
            outer={
                "token_embd": "gpt_neox.embed_in",
                "output_norm": "gpt_neox.final_layer_norm",
                "output": "embed_out",
            },
            changes=_by_head,
            eps=_EPS,
            rotates_part=True,
            has_norm_biases=True,
            biases={"": _NEOX},
        ),
        "phi2": Architecture(
            model_type="phi",
            class_name="PhiForCausalLM",
            extend=_phi2,
            parts=dict(zip(_FUSED[1:], _PHI, strict=True)),
            outer={"output_norm": "model.final_layernorm"},
            # The first files have one tensor for queries, keys and values.
            changes=_apart,
            eps=_EPS,
            rotates_part=True,
            has_norm_biases=True,
            has_head_bias=True,
            biases={"": (*QKV, *_PHI)},
        ),
        "nemotron": Architecture(
            model_type="nemotron",
            class_name="NemotronForCausalLM",
            extend=_nemotron,
            eps=_EPS,
            rotates_part=True,
            norm_offset=1.0,
            has_norm_biases=True,
            biases={"attention_bias": ATTENTION, "mlp_bias": ("mlp.up_proj", "mlp.down_proj")},
        ),
        "phimoe": Architecture(
            model_type="phimoe",
            class_name="PhimoeForCausalLM",
            extend=_phimoe,
            keys=MIXTRAL.keys,
            parts=MIXTRAL.parts,
            has_norm_biases=True,
            has_head_bias=True,
            biases={"attention_bias": ATTENTION},
        ),
    }
)
