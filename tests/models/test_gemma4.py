"""What the reader of Gemma 4's config.json refuses."""

from __future__ import annotations

from typing import Any

import pytest

from entrollm.errors import EntroLLMError, FormatError, UnsupportedError
from entrollm.models import read_config
from entrollm.models.config import SharedKeys
from entrollm.models.config_fields import Fields

_SLIDING, _FULL = "sliding_attention", "full_attention"
_FOUR = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
    "num_kv_shared_layers": 2,
}
_FULL_SIZES = {"head_dim": 32}


def test_layers_that_share_keys_have_the_heads_of_those_that_own_them() -> None:
    sizes = {"per_layer_config": {"1": _FULL_SIZES, "3": _FULL_SIZES}}
    config = read_config(Fields({**_FOUR, **sizes, "use_double_wide_mlp": True}, "config.json"))
    assert config.mixers == (None, None, SharedKeys(source=0), SharedKeys(source=1))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"per_layer_config": {"1": _FULL_SIZES}},
            FormatError,
            "layer 3 shares the keys of layer 1, but per_layer_config gives them other head_dim or num_key_value_heads",
        ),
        ({"per_layer_config": {"2": {"num_key_value_heads": 4}}}, FormatError, "layer 2 shares the keys of layer 0"),
        ({"num_kv_shared_layers": 3}, FormatError, "num_kv_shared_layers 3 of 4 leaves no layer with keys of its own"),
        (
            {"per_layer_config": {"0": {"num_key_value_heads": 3}}},
            FormatError,
            "num_attention_heads 4 is not a multiple of the 3 key-value heads of layer 0",
        ),
        ({"per_layer_config": {"0": {"sliding_window": 8}}}, UnsupportedError, "'sliding_window' is not supported"),
        ({"use_bidirectional_attention": "all"}, UnsupportedError, "use_bidirectional_attention other than for vision"),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8},
            FormatError,
            "top_k_experts 5 is more than num_experts 4",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], kind: type[EntroLLMError], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_config(Fields({**_FOUR, **changes}, "config.json"))
