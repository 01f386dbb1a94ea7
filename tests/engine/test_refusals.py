"""Configurations, files and weights that the engine must refuse by name, whatever they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrollm.engine.files import ModelFiles, read_model_files
from entrollm.engine.model import Model
from entrollm.errors import EntroLLMError, FormatError, UnsupportedError
from entrollm.models import ARCHITECTURES, read_config
from entrollm.models.config import ModelConfig
from entrollm.models.config_fields import Fields
from tests.engine.dense import DenseWeights
from tests.support.paths import TINY_LLAMA

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 4}


def parse(**changes: object) -> ModelConfig:
    values = {**CONFIG, **changes}
    return read_config(Fields({key: value for key, value in values.items() if value != "absent"}, "config.json"))


def tensors() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (11, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
        f"{layer}input_layernorm.weight": (8,),
        f"{layer}post_attention_layernorm.weight": (8,),
        f"{layer}self_attn.q_proj.weight": (8, 8),
        f"{layer}self_attn.k_proj.weight": (4, 8),
        f"{layer}self_attn.v_proj.weight": (4, 8),
        f"{layer}self_attn.o_proj.weight": (8, 8),
        f"{layer}mlp.gate_proj.weight": (12, 8),
        f"{layer}mlp.up_proj.weight": (12, 8),
        f"{layer}mlp.down_proj.weight": (8, 12),
    }
    return {name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()}


def small_model() -> Model:
    return Model(ModelFiles(CONFIG), DenseWeights(tensors()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "bloom"},
            "model_type 'bloom' is not supported; supported: cohere2, .*plugin .* runs any other architecture",
        ),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: gelu, .*silu"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is not"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm is not supported"),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["conv"]},
            "layer type 'conv' is not supported; supported: attention, mamba",
        ),
        ({"model_type": "qwen3_next", "layer_types": ["conv"]}, "layer type 'conv' is not supported"),
        ({"model_type": "lfm2", "layer_types": ["mamba"]}, "layer type 'mamba' is not supported"),
        (
            {"model_type": "nemotron_h", "layer_types": ["moe"], "moe_latent_size": 4},
            "moe_latent_size is not supported",
        ),
        ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "noaux"}, "topk_method 'noaux' is not"),
        ({"model_type": "glm4_moe_lite", "mlp_layer_types": ["thin"]}, "mlp_layer_types has 'thin'; supported: dense"),
        ({"model_type": "phimoe", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv is not supported"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "t5"}},
            "text_config: model_type 't5' is not supported",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type 'dynamic' is not supported; supported: default, linear, llama3, longrope, proportional, yarn",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5 is not supported for this model type"),
        (
            {"model_type": "qwen2", "layer_types": ["chunked_attention"]},
            "layer type 'chunked_attention' is not supported; supported: full_attention, sliding_attention",
        ),
    ],
)
def test_unsupported(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"config\.json.*{message}"):
        parse(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "absent"}, "model_type should be a string, found nothing"),
        ({"hidden_size": "absent"}, "hidden_size should be an integer from 1 to 16777216, found nothing"),
        ({"hidden_size": "8"}, "hidden_size should be an integer from 1 to 16777216, found '8'"),
        ({"hidden_size": True}, "hidden_size should be an integer .* found True"),
        ({"vocab_size": 2**40}, "vocab_size should be an integer .* found 1099511627776"),
        ({"num_hidden_layers": 0}, "num_hidden_layers should be an integer from 1 to 4096, found 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 10}, "hidden_size 10 is not a multiple of num_attention_heads 4"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps should be a finite number from 0 to 1, found nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps should be a finite number .* found 1000000.*"),
        ({"attention_bias": "yes"}, "attention_bias should be true or false, found 'yes'"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id should be a token id or a list of token ids, found \[1, 'x'\]"),
        ({"rope_parameters": [1]}, r"rope_parameters should be an object, found \[1\]"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_type should be a string, found 3"),
        ({"rope_theta": 0}, "rope_theta should be a finite number from 1 to 1e"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor should be a finite number .* found nothing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor should be a finite number from 1e-06 .* found 0"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            r"low_freq_factor 4\.0 should be below high_freq_factor 1\.0",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 8}, "rope_theta": 1},
            "rope_theta should be a number other than 1 for the rope type yarn",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {**LONGROPE, "long_factor": [1.0, 2.0]}},
            r"long_factor should be a list of 1 numbers from 1e-06 to 1e\+12, found \[1\.0, 2\.0\]",
        ),
        (
            {"model_type": "phi3", "rope_scaling": LONGROPE, "original_max_position_embeddings": 0},
            "original_max_position_embeddings should be an integer .* found 0",
        ),
        ({"head_dim": 1}, "1 of 1 features per head cannot be rotated in pairs"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window should be an integer from 1 .* found 0"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 2}, "layer_types should be a list of 1 strings"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"]},
            "layer_types has sliding_attention, but no sliding_window is in use",
        ),
        (
            {"model_type": "gemma2", "sliding_window": None},
            "layer_types has sliding_attention, but no sliding_window is in use",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}},
            "rope_parameters: 'rope_type' is not a kind of layer; expected full_attention, sliding_attention",
        ),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 0},
            "attn_logit_softcapping should be a finite number",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [2]}, "no_rope_layers should be a list of 1 integers from 0 to 1"),
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, "sliding_window_pattern should be an integer"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 5},
            "num_experts_per_tok 5 is more than num_local_experts 4",
        ),
        (
            {"model_type": "granitemoehybrid", "mamba_n_heads": 3, "layer_types": ["mamba"]},
            "mamba_n_heads 3 of 5 features, in 1 groups, do not share the 16 features",
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 3, "topk_group": 1},
            r"8 of 8 experts cannot come from 1 \(topk_group\) of 3 \(n_group\) equal groups",
        ),
        (
            {"model_type": "qwen3_next", "linear_num_key_heads": 3, "linear_num_value_heads": 4},
            "linear_num_value_heads 4 is not a multiple of linear_num_key_heads 3",
        ),
        ({"model_type": "ernie4_5_moe", "moe_k": 3, "moe_num_experts": 2}, "moe_k 3 is more than moe_num_experts 2"),
        ({"model_type": "phimoe", "num_experts_per_tok": 3}, "num_experts_per_tok 3 should be 2"),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "MX"},
            r"hybrid_override_pattern should be letters of M\*-E, found 'MX'",
        ),
        (
            {"model_type": "nemotron_h", "layer_types": ["mamba"], "n_groups": 1, "time_step_limit": [2, 1]},
            "time_step_limit should be two numbers in order",
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [True]}, "mlp_only_layers should be a list of layers"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling should be a finite number from 1e-06"),
    ],
)
def test_malformed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=rf"config\.json.*{message}"):
        parse(**changes)


_KEYS = [
    *CONFIG,
    *("head_dim", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "sliding_window_pattern"),
    *("no_rope_layers", "no_rope_layer_interval", "query_pre_attn_scalar", "attn_logit_softcapping", "logit_scale"),
    *("num_experts", "num_experts_per_tok", "mlp_only_layers", "decoder_sparse_step", "moe_intermediate_size"),
    *("embedding_multiplier", "logits_scaling", "residual_multiplier", "use_parallel_residual", "hidden_activation"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"),
]
_ROPE_KEYS = ["factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "attention_factor"]
_ROPE_KEYS += ["beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "original_max_position_embeddings"]
_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from([0, 1, 2, 4, 64, 2.0, 1e30, 1e-30]), st.text()
)
_ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "longrope"])},
    optional={key: st.one_of(_SCALARS, st.lists(_SCALARS, max_size=2)) for key in _ROPE_KEYS},
)


@given(
    st.sampled_from(list(ARCHITECTURES)),
    st.dictionaries(st.sampled_from(_KEYS), st.one_of(_SCALARS, st.lists(_SCALARS, max_size=3), _ROPES), max_size=4),
)
def test_any_config_is_read_or_refused(model_type: str, changes: dict[str, object]) -> None:
    values = {**CONFIG, "head_dim": 2, "model_type": model_type, **changes}
    try:
        config = read_config(Fields(values, "config.json"))
    except EntroLLMError as error:
        assert "config.json" in str(error)
    else:
        assert np.isfinite(config.rope.frequencies).all()


@pytest.mark.parametrize("key", ["mscale", "mscale_all_dim", "attention_factor"])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama"])
def test_factors_of_yarn_are_bounded(model_type: str, key: str) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4, key: 1e200}
    with pytest.raises(FormatError, match=rf"config\.json.* {key} should be a finite number from 0 to 1e\+12"):
        read_config(Fields({**CONFIG, "head_dim": 2, "model_type": model_type, "rope_scaling": rope}, "config.json"))


@pytest.mark.parametrize("name", list(tensors()))
def test_missing_and_misshapen_tensors(name: str) -> None:
    expected = tensors()[name].shape
    missing = tensors()
    del missing[name]
    with pytest.raises(FormatError, match=rf"^{name}: the tensor is missing[;,].*config\.json"):
        Model(ModelFiles(CONFIG), DenseWeights(missing))
    found = (expected[0] + 1, *expected[1:])
    misshapen = {**tensors(), name: np.ones(found, dtype=np.float32)}
    with pytest.raises(FormatError) as caught:
        Model(ModelFiles(CONFIG), DenseWeights(misshapen))
    assert str(caught.value) == f"{name}: config.json asks for shape {expected}, found {found}"


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([], ValueError, r"non-empty one-dimensional sequence, got shape \(0,\)"),
        ([[1, 2]], ValueError, r"non-empty one-dimensional sequence, got shape \(1, 2\)"),
        ([1.5], TypeError, "token ids should be integers, got float64"),
        ([1, 11], ValueError, "token id 11 is outside the vocabulary of 11"),
        ([-1], ValueError, "token id -1 is outside the vocabulary of 11"),
    ],
)
def test_bad_ids(ids: Any, error: type[Exception], message: str) -> None:
    model = small_model()
    with pytest.raises(error, match=message):
        model.logits(ids)
    with pytest.raises(error, match=message):
        model.generate(ids)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"this model has no tokenizer\.json; give token ids in place of text"):
        small_model().generate("Hello")


def test_generation_without_a_tokenizer_has_no_text() -> None:
    result = small_model().generate([1, 2], max_tokens=3)
    assert (result.text, len(result.token_ids)) == ("", 3)


def test_empty_prompt_without_start_token() -> None:
    tokenizer = read_model_files(TINY_LLAMA).tokenizer
    model = Model(ModelFiles({**CONFIG, "bos_token_id": None}, tokenizer), DenseWeights(tensors()))
    with pytest.raises(ValueError, match="the prompt is empty, and the model names no start token"):
        model.generate("")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, r"config\.json: there is no such file; a model folder needs one"),
        ("config.json", b"{", r"config\.json: not valid JSON: "),
        ("config.json", b"[" * 100000, r"config\.json: not valid JSON: "),
        ("config.json", b"[1]", r"config\.json: should hold a JSON object, found list"),
        ("config.json", b"\xff\xfe", r"config\.json: not UTF-8 text: "),
        ("generation_config.json", b"nope", r"generation_config\.json: not valid JSON: "),
        ("tokenizer_config.json", b"3", r"tokenizer_config\.json: should hold a JSON object, found int"),
        ("tokenizer.json", b"{}", r"tokenizer\.json: not a valid tokenizer: "),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: not UTF-8 text: "),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_model_files(tmp_path)


def test_special_tokens_and_tokenizer_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<old>", "unk_token": {"content": "<unk>"}}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": null, "x": "y"}')
    padded = json.loads((TINY_LLAMA / "tokenizer.json").read_text())
    padded["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(padded))
    files = read_model_files(tmp_path)
    assert files.special_tokens == {"bos_token": "<s>", "unk_token": "<unk>"}
    assert files.tokenizer is not None
    assert len(files.tokenizer.encode("one two three four five six seven").ids) > 3


@pytest.mark.parametrize("missing", ["mlp.gate", "mlp.experts.2.up_proj"])
def test_missing_routers_and_experts_are_named(missing: str) -> None:
    config = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2}
    config |= {"moe_intermediate_size": 12, "head_dim": 2}
    layer = "model.layers.0."
    found = tensors()
    for number in range(3):
        for part in ("gate_proj", "up_proj", "down_proj"):
            found[f"{layer}mlp.experts.{number}.{part}.weight"] = found[f"{layer}mlp.{part}.weight"]
    found[f"{layer}mlp.gate.weight"] = np.ones((3, 8), dtype=np.float32)
    found |= {f"{layer}self_attn.{part}_norm.weight": np.ones(2, dtype=np.float32) for part in "qk"}
    assert np.isfinite(Model(ModelFiles(config), DenseWeights(found)).logits([1, 2])).all()
    del found[f"{layer}{missing}.weight"]
    with pytest.raises(FormatError, match=rf"^{layer}{missing}\.weight: the tensor is missing"):
        Model(ModelFiles(config), DenseWeights(found))


@pytest.mark.parametrize("changes", [{"model_type": "bert"}, {"rope_scaling": {"type": "other", "factor": 2.0}}])
def test_a_model_that_only_transformers_runs_names_the_plugin(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"entrollm\.hf"):
        Model(ModelFiles({**CONFIG, **changes}), DenseWeights(tensors()))
