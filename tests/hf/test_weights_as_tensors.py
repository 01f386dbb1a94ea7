"""Architectures of transformers whose code uses a layer's weight as a tensor, and resized embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import entrollm.hf
from entrollm import CompressOptions, OptionError, _core, compress
from entrollm.compress.export import export
from entrollm.format.reader import CompressedModel

SMALL: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 128,
}
IDS = torch.arange(3, 15)[None]
CLIP: dict[str, Any] = {
    "text_config": {**SMALL, "max_position_embeddings": 64, "eos_token_id": 2},
    "vision_config": {**SMALL, "image_size": 32, "patch_size": 8},
    "projection_dim": 64,
}
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "falcon": ("AutoModelForCausalLM", transformers.FalconConfig(**SMALL), {"input_ids": IDS}),
    "rwkv": (
        "AutoModelForCausalLM",
        # Rescales every layer but the first.
        transformers.RwkvConfig(**SMALL, attention_hidden_size=96, context_length=64, rescale_every=1),
        {"input_ids": IDS},
    ),
    "deberta": ("AutoModelForMaskedLM", transformers.DebertaConfig(**SMALL, legacy=False), {"input_ids": IDS}),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        transformers.WhisperConfig(
            vocab_size=307,
            d_model=96,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_source_positions=50,
            max_target_positions=64,
            num_mel_bins=16,
            decoder_start_token_id=1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        {"input_features": torch.randn(1, 16, 100), "decoder_input_ids": IDS[:, :5]},
    ),
    "perceiver": (
        "AutoModelForMaskedLM",
        transformers.PerceiverConfig(
            vocab_size=307,
            d_model=96,
            d_latents=64,
            num_latents=8,
            num_self_attends_per_block=1,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
            max_position_embeddings=64,
            qk_channels=32,
            v_channels=64,
        ),
        {"input_ids": IDS},
    ),
    "chinese-clip": (
        "AutoModel",
        transformers.ChineseCLIPConfig(**CLIP),
        {"input_ids": IDS, "pixel_values": torch.randn(1, 3, 32, 32)},
    ),
    "layoutlmv3": (
        "AutoModelForTokenClassification",
        transformers.LayoutLMv3Config(**SMALL, visual_embed=False, coordinate_size=16, shape_size=16),
        {"input_ids": IDS, "bbox": torch.zeros(1, 12, 4, dtype=torch.long)},
    ),
}


def answer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**inputs)
    tensor: torch.Tensor = found.logits if hasattr(found, "logits") else found.logits_per_text
    return tensor


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_like_its_export(name: str, tmp_path: Path) -> None:
    kind, config, inputs = MODELS[name]
    loader = getattr(transformers, kind)
    torch.manual_seed(3)
    loader.from_config(config).save_pretrained(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "coded", CompressOptions(bits=6))
    with CompressedModel.open(tmp_path / "coded") as stored:
        export(stored, tmp_path / "f32", _core.ThreadPool(1), "f32")
    found = answer(loader.from_pretrained(tmp_path / "coded", dtype=torch.float32), inputs)
    expected = answer(loader.from_pretrained(tmp_path / "f32", dtype=torch.float32), inputs)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("change", [{"new_num_tokens": 310}, {"pad_to_multiple_of": 64}])
def test_resizing_coded_embeddings_is_refused(coded: Path, change: dict[str, int]) -> None:
    model = entrollm.hf.load(coded)
    name = "model.embed_tokens.weight"
    for inner in (model, model.model):
        with pytest.raises(OptionError, match=rf"{name} is coded with 307 rows.*resized to 3\d0.*keep=\['{name}'\]"):
            inner.resize_token_embeddings(**change)
    assert model.resize_token_embeddings(307).weight.shape == (307, 96)
    assert model.resize_token_embeddings().weight.shape == (307, 96)


def test_kept_embeddings_are_resized(coded: Path, tmp_path: Path) -> None:
    compress(coded.parent / "source", tmp_path / "kept", CompressOptions(keep=["*embed*"]))
    model = entrollm.hf.load(tmp_path / "kept")
    assert model.resize_token_embeddings(320).weight.shape == (320, 96)
    with torch.no_grad():
        assert model(IDS).logits.shape == (1, 12, 320)
