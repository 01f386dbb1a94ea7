"""Matrices that are coded while a checkpoint is loaded."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import entrollm.hf
from entrollm import CompressOptions, compress
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format import layout
from entrollm.format.entry import join_arrays, split_entries
from entrollm.format.reader import CompressedModel
from entrollm.hf import EntroConfig, EntroEmbedding, EntroLinear
from tests.torch.models import ids, logits


@pytest.fixture(scope="module")
def checkpoint(coded: Path) -> Path:
    return coded.parent / "source"


def load(checkpoint: Path, config: EntroConfig, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, **options)


@pytest.mark.parametrize(
    "config",
    [
        EntroConfig(),
        EntroConfig(bits=4),
        EntroConfig(bits=8, prefer="speed", threads=2),
        EntroConfig(bits=3, granularity="row", overrides={"*embed*": 8}, keep=["*.0.*q_proj*"]),
        EntroConfig(lossless=True),
        EntroConfig(bits=4, lossless_for=["*embed*"]),
        EntroConfig(trellis=True),
    ],
    ids=["default", "4", "8-speed", "overrides", "lossless", "some lossless", "trellis"],
)
def test_integers_are_those_of_the_command(checkpoint: Path, config: EntroConfig, tmp_path: Path) -> None:
    model = load(checkpoint, config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "live")
    compress(checkpoint, tmp_path / "command", config.options())
    with CompressedModel.open(tmp_path / "live") as live, CompressedModel.open(tmp_path / "command") as command:
        assert dict(live.specs) == dict(command.specs)  # checksums included
        assert any(spec.has_trellis for spec in live.specs.values()) == config.trellis
        assert set(live.plain) == set(command.plain)
        for name in live.plain:
            assert live.array(name).tobytes() == command.array(name).tobytes()
    again = entrollm.hf.load(tmp_path / "command", dtype=torch.bfloat16)
    assert torch.equal(logits(again, ids()), logits(model, ids()))


def test_integers_do_not_depend_on_the_type_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    states = [load(checkpoint, EntroConfig(), dtype=dtype).state_dict() for dtype in (torch.float32, torch.bfloat16)]
    coded = [name for name in states[0] if name.endswith(".coded")]
    assert coded
    assert all(torch.equal(states[0][name], states[1][name]) for name in coded)


@pytest.mark.parametrize("config", [EntroConfig(bpw=5.0), EntroConfig(size="150KB")])
def test_sizes_are_met(checkpoint: Path, config: EntroConfig, tmp_path: Path) -> None:
    model = load(checkpoint, config)
    model.save_pretrained(tmp_path)
    with CompressedModel.open(tmp_path) as saved:
        size = saved.file_bytes()
        weights = sum(spec.rows * spec.columns for spec in saved.specs.values())
        weights += sum(saved.array(name).size for name in saved.plain)
        assert saved.config["quantization_config"]["method"] == "ecsq"
    if config.bpw is not None:
        assert size * 8 / weights == pytest.approx(config.bpw, rel=0.01)
    else:
        assert 0.99 * 150_000 < size <= 150_000


def test_size_out_of_reach_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="this model cannot take"):
        load(checkpoint, EntroConfig(bpw=0.2))


def test_override_that_matches_nothing_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="matches none of the"):
        load(checkpoint, EntroConfig(keep=["*nothing*"]))


def test_weight_that_is_not_finite_is_named(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(
        checkpoint, tmp_path / "bad", lambda state: state["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan"))
    )
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(RuntimeError, match="CONVERSION"):
        load(tmp_path / "bad", EntroConfig(bits=4))
    assert "tensor 'model.layers.1.mlp.up_proj.weight' has nan at [3, 0]; weights must be finite" in caplog.text
    with pytest.raises(
        FormatError, match=r"has nan at \[3, 0\]; weights must be finite"
    ):  # a size looks at samples first
        load(tmp_path / "bad", EntroConfig())


def test_compressed_folder_is_not_quantized_again(coded: Path) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(coded, EntroConfig(bits=8))
    assert model.config.quantization_config == EntroConfig(bits=4)


def test_model_on_a_device_map(checkpoint: Path) -> None:
    model = load(checkpoint, EntroConfig(), device_map={"": "cpu"})
    assert torch.equal(logits(model, ids()), logits(load(checkpoint, EntroConfig()), ids()))


def change(checkpoint: Path, place: Path, edit: Any) -> None:
    """A copy of a checkpoint in one file, with other tensors."""
    place.mkdir()
    state: dict[str, torch.Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        state |= load_file(file)
    edit(state)
    save_file(state, place / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        (place / name).write_bytes((checkpoint / name).read_bytes())


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("stored", ["head", "both"])
@pytest.mark.parametrize("live", [False, True])
def test_tied_matrix_is_found_under_either_name(
    checkpoint: Path, coded: Path, tmp_path: Path, stored: str, live: bool
) -> None:
    def edit(state: dict[str, torch.Tensor]) -> None:
        state[HEAD] = state[EMBEDDING].clone()
        if stored == "head":
            del state[EMBEDDING]

    change(checkpoint, tmp_path / "source", edit)
    if live:
        model = load(tmp_path / "source", EntroConfig(bits=4), dtype=torch.float32)
    else:
        compress(tmp_path / "source", tmp_path / "coded", CompressOptions(bits=4))
        model = entrollm.hf.load(tmp_path / "coded", dtype=torch.float32)
    assert isinstance(model.lm_head, EntroLinear)
    assert isinstance(model.model.embed_tokens, EntroEmbedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, ids()), logits(entrollm.hf.load(coded, dtype=torch.float32), ids()))


def test_pickled_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="read from safetensors files only"):
        load(tmp_path, EntroConfig())


def test_state_dict_alone_is_refused(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="not from a state_dict"):
        type(model).from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), quantization_config=EntroConfig()
        )


def test_rows_have_scales_that_follow_loaded_states(checkpoint: Path) -> None:
    """Scales are copied when a matrix is opened, so a state that is loaded later opens it again."""
    model = load(checkpoint, EntroConfig(bits=4, granularity="row"))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.ones(1, 96)
    before = layer(x)
    spec = layer.weight.spec
    assert spec.parts is not None
    arrays = split_entries("up_proj", spec, {layout.CODED: layer.weight.coded.numpy()})
    arrays = {suffix: -array if array.dtype == np.float32 else array for suffix, array in arrays.items()}
    arrays[layout.SPARSE] = arrays[layout.SPARSE][: layout.padded_size(spec.parts[1])]
    negated, entries = join_arrays(replace(spec, parts=None), arrays)
    assert negated.parts == spec.parts
    layer.load_state_dict({"weight.coded": torch.from_numpy(entries[layout.CODED])})
    assert np.array_equal(layer(x).numpy(), -before.numpy())
