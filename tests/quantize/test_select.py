"""Which tensors are quantized, and to how many bits."""

import pytest

from entrollm.quantize import BitsOverride, TensorPlan, plan_tensors
from entrollm.quantize.select import is_quantizable

SHAPES = {
    "model.embed_tokens.weight": (100, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.1.mlp.up_proj.weight": (16, 8),
    "conv.weight": (4, 4, 3),
    "lm_head.weight": (100, 8),
}


def bits_of(bits: int, *overrides: BitsOverride) -> dict[str, int | None]:
    return {name: plan.bits for name, plan in plan_tensors(SHAPES, bits, overrides).items()}


def test_matrices_are_quantized_and_all_else_kept() -> None:
    assert bits_of(4) == {
        "model.embed_tokens.weight": 4,
        "model.layers.0.self_attn.q_proj.weight": 4,
        "model.layers.0.self_attn.q_proj.bias": None,
        "model.layers.0.input_layernorm.weight": None,
        "model.layers.1.mlp.up_proj.weight": 4,
        "conv.weight": None,
        "lm_head.weight": 4,
    }


def test_transposed_experts_are_matrices() -> None:
    assert is_quantizable("a.experts.down_proj.3.T", (8, 4))
    assert not is_quantizable("a.experts.down_proj.3.T", (8,)) and not is_quantizable("a.experts.down_proj.T", (8, 4))


def test_plans_keep_the_order_and_the_granularity() -> None:
    plans = plan_tensors(SHAPES, 8, granularity="row")
    assert list(plans) == list(SHAPES)
    assert plans["lm_head.weight"] == TensorPlan(8, "row")
    assert plans["conv.weight"].is_kept and not plans["lm_head.weight"].is_kept


def test_a_later_override_wins() -> None:
    chosen = bits_of(4, BitsOverride("model.layers.*", 8), BitsOverride("*.1.*", 3), BitsOverride("lm_head*", None))
    assert chosen["model.layers.0.self_attn.q_proj.weight"] == 8
    assert chosen["model.layers.1.mlp.up_proj.weight"] == 3
    assert chosen["lm_head.weight"] is None
    assert chosen["model.layers.0.input_layernorm.weight"] is None


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(ValueError, match=r"'LM_HEAD\*' matches none of the 7 tensors"):
        bits_of(4, BitsOverride("LM_HEAD*", 8))


def test_a_pattern_for_the_head_of_a_model_whose_embedding_it_is_says_so() -> None:
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    with pytest.raises(ValueError, match=r"none of the 2 tensors; the output head .* is its embedding, model"):
        plan_tensors(shapes, 4, [BitsOverride("lm_head*", None)])


def test_bits_for_tensors_that_are_no_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'\*\.bias' matches no matrix"):
        bits_of(4, BitsOverride("*.bias", 8))


def test_override_bits_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="found 9"):
        bits_of(4, BitsOverride("*", 9))


def test_default_bits_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="found 1"):
        bits_of(1)


def test_only_two_axes_named_weight_are_quantizable() -> None:
    assert is_quantizable("x.weight", (2, 3))
    assert not is_quantizable("x.weight", (2, 3, 4))
    assert not is_quantizable("x.inv_freq", (2, 3))
