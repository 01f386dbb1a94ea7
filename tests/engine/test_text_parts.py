"""Text parts of models of text and images, and checkpoints whose names have no prefix."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from entrollm import CompressOptions, _core, compress, load
from entrollm.calibrate import CalibrationText, calibrate
from entrollm.compress.export import export
from entrollm.engine.check import why_not_run
from entrollm.errors import UnsupportedError
from entrollm.format.reader import CompressedModel
from tests.engine.architectures import (
    ARCHITECTURES,
    VOCAB_SIZE,
    load_reference,
    random_ids,
    reference_logits,
    relative_difference,
)
from tests.engine.dense import load_dense

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config={**_TEXT, "query_pre_attn_scalar": 16},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=300,
        boi_token_index=301,
        eoi_token_index=302,
    )


def _gemma4() -> Any:
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    inputs = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}
    return transformers.Gemma4Config(
        text_config={**_TEXT, **layers, **inputs, "global_head_dim": 32, "num_kv_shared_layers": 2},
        vision_config={**_VISION, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64},
        image_token_id=300,
        video_token_id=301,
        audio_token_id=302,
        boi_token_id=303,
        eoi_token_id=304,
        boa_token_id=305,
        eoa_token_index=306,
    )


def _lfm2() -> Any:
    return transformers.Lfm2VlConfig(
        text_config={**_TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        vision_config={**_VISION, "model_type": "siglip2_vision_model", "num_patches": 4},
        image_token_id=300,
        projector_hidden_size=64,
    )


def _mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config={**_TEXT, "model_type": "ministral3", "sliding_window": None},
        vision_config={**_VISION, "model_type": "pixtral", "head_dim": 16},
        image_token_index=300,
    )


@pytest.mark.parametrize("make", [_gemma3, _gemma4, _lfm2, _mistral3])
def test_the_text_part_runs_and_the_rest_is_kept(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(3)
    model = transformers.AutoModelForImageTextToText.from_config(make())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    source, coded, exported = tmp_path / "source", tmp_path / "coded", tmp_path / "exported"
    model.to(torch.bfloat16).save_pretrained(source)
    assert why_not_run(source) is None
    compress(source, coded, CompressOptions(bits=8))
    with CompressedModel.open(coded) as folder:
        export(folder, exported, _core.ThreadPool(1), "f32")
        stored = {*folder.specs, *folder.plain}
    assert stored == set(load_file(source / "model.safetensors"))
    with caplog.at_level(logging.WARNING):
        ours = load(coded)
    assert "tensors of other parts than text" in caplog.text
    reference = transformers.AutoModelForImageTextToText.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for count in (1, 40):
        ids = random_ids(count, vocab_size=290)
        assert relative_difference(ours.logits(ids), reference_logits(reference, ids)) <= 2e-3
        assert relative_difference(load(exported).logits(ids), reference_logits(reference, ids)) <= 1e-4
    with pytest.raises(UnsupportedError, match="calibration covers models of text alone"):
        calibrate(source, CalibrationText(None, sampled=8), tmp_path)


def test_gpt2_without_the_prefix_of_its_names(tmp_path: Path) -> None:
    source = ARCHITECTURES["gpt2"](tmp_path)
    reference = load_reference(source)
    tensors: dict[str, Any] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= {name.removeprefix("transformer."): array for name, array in load_file(shard).items()}
        shard.unlink()
    (source / "model.safetensors.index.json").unlink()
    save_file(tensors, source / "model.safetensors")
    assert why_not_run(source) is None
    ids = random_ids(30)
    assert relative_difference(load(source).logits(ids), reference_logits(reference, ids)) <= 1e-4


def test_gpt2_has_no_positions_beyond_its_context(tmp_path: Path) -> None:
    model = load_dense(ARCHITECTURES["gpt2"](tmp_path))
    assert model.logits(random_ids(256)).shape == (256, VOCAB_SIZE)
    with pytest.raises(ValueError, match="this model has 256 positions, and 257 tokens do not fit"):
        model.logits(random_ids(257))
