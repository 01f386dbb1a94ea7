"""Compressed folders as models of transformers on the CPU, and back to folders."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import entrollm
import entrollm.hf
from entrollm import _core
from entrollm.compress.export import export
from entrollm.errors import CorruptStreamError, UnsupportedError
from entrollm.files.shards import open_weight_files
from entrollm.format.reader import CompressedModel
from entrollm.hf import CodedWeight, EntroEmbedding, EntroLinear
from tests.torch.models import difference, ids, logits

# Activations are rounded to 16 bits.
TOLERANCE = 1e-3


def exported(coded: Path, place: Path) -> Any:
    with CompressedModel.open(coded) as model:
        export(model, place, _core.ThreadPool(1), "f32")
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)


@pytest.mark.parametrize("name", ["coded", "coded_untied"])
def test_coded_model_computes_what_its_export_does(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model.model.embed_tokens, EntroEmbedding)
    assert isinstance(model.lm_head, EntroLinear)
    assert isinstance(model.model.layers[1].mlp.down_proj, EntroLinear)
    tokens = ids(batch=2)
    assert difference(logits(model, tokens), logits(exported(folder, tmp_path / "f32"), tokens)) < TOLERANCE


def test_logits_are_those_of_the_engine(coded: Path) -> None:
    model = entrollm.hf.load(coded, dtype=torch.float32)
    tokens = ids()
    engine = entrollm.load(coded, threads=1)
    expected = torch.from_numpy(np.asarray(engine.logits(tokens[0].tolist())))
    assert difference(logits(model, tokens)[0, -1], expected.reshape(-1, expected.shape[-1])[-1]) < TOLERANCE


def test_damage_is_refused_unless_checks_are_left_out(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(coded, tmp_path / "damaged")
    name = "model.layers.1.mlp.down_proj.weight"
    for file, opened in open_weight_files(folder).items():
        if name + ".coded" in opened.tensors:
            content = bytearray((folder / file).read_bytes())
            content[opened.tensors[name + ".coded"].begin] ^= 1
            (folder / file).write_bytes(content)
    for load in (entrollm.hf.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CorruptStreamError, match=f"the bytes of '{name}' have CRC-32"):
            load(folder)
    entrollm.hf.load(folder, check=False)
    monkeypatch.setenv("ENTROLLM_CHECK", "0")
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CorruptStreamError):
        entrollm.hf.load(folder)
    monkeypatch.setenv("ENTROLLM_CHECK", "no")
    with pytest.raises(ValueError, match="ENTROLLM_CHECK should be 0 or 1, found 'no'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_tied_head_shares_the_embedding(coded: Path) -> None:
    model = entrollm.hf.load(coded)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    clone = copy.deepcopy(model)
    assert clone.lm_head.weight is clone.model.embed_tokens.weight
    assert clone.lm_head.weight is not model.lm_head.weight
    assert clone.save_pretrained.__self__ is clone


def test_state_has_the_stored_entries_under_their_names(coded: Path) -> None:
    model = entrollm.hf.load(coded)
    state = model.state_dict()
    with CompressedModel.open(coded) as stored:
        for name in stored.specs:
            for suffix, array in stored.entries(name).items():
                tensor = state[name + suffix]
                assert np.array_equal(tensor.view(torch.uint8).numpy(), array.view(np.uint8))
        assert set(stored.plain) < set(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_keep_their_type(coded: Path, dtype: torch.dtype) -> None:
    model = entrollm.hf.load(coded, dtype=dtype)
    assert model.dtype == dtype
    assert model.model.embed_tokens(ids()).dtype == dtype
    assert model.model.layers[0].mlp.up_proj(torch.ones(1, 96, dtype=dtype)).dtype == dtype
    expected = logits(entrollm.hf.load(coded, dtype=torch.float32), ids())
    assert difference(logits(model, ids()), expected) < 0.05


def test_casting_a_model_keeps_its_entries(coded: Path) -> None:
    model = entrollm.hf.load(coded, dtype=torch.float32)
    layer = copy.deepcopy(model.model.layers[0].mlp.up_proj)
    before = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    layer = layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == before


@pytest.mark.parametrize("shard", ["50GB", "60KB"])
@pytest.mark.parametrize("name", ["coded", "coded_untied"])
def test_saved_model_is_loaded_again_by_both(
    name: str, shard: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    model = entrollm.hf.load(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 1) == (shard == "60KB")
    with CompressedModel.open(tmp_path / "saved") as saved, CompressedModel.open(folder) as stored:
        assert set(saved.specs) == set(stored.specs)
        assert set(saved.plain) == set(stored.plain)
        for tensor in (*saved.specs, *saved.plain):
            saved.check_checksum(tensor)
        assert saved.config["quantization_config"] == stored.config["quantization_config"]
    again = entrollm.hf.load(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(logits(again, ids()), logits(model, ids()))
    prompt = ids()[0].tolist()
    assert entrollm.load(tmp_path / "saved").logits(prompt).tobytes() == entrollm.load(folder).logits(prompt).tobytes()


def test_saving_replaces_an_earlier_model(coded: Path, coded_untied: Path, tmp_path: Path) -> None:
    entrollm.hf.load(coded_untied).save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    entrollm.hf.load(coded).save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "entrollm_checksums.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_interrupted_saving_leaves_the_earlier_model(
    coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = entrollm.hf.load(coded)
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(model.config, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_saving_refuses_what_it_does_not_do(coded: Path, tmp_path: Path) -> None:
    model = entrollm.hf.load(coded)
    with pytest.raises(UnsupportedError, match=r"call model\.push_to_hub"):
        model.save_pretrained(tmp_path / "a", push_to_hub=True)
    with pytest.raises(UnsupportedError, match="no option 'variant'"):
        model.save_pretrained(tmp_path / "a", variant="fp16", state_dict=None)
    with pytest.raises(UnsupportedError, match="from_pretrained has replaced"):
        type(model).save_pretrained(model, tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        model.save_pretrained(tmp_path / "file")
    model.save_pretrained(tmp_path / "c", is_main_process=False)
    assert not (tmp_path / "c").exists()


def test_pushing_uploads_the_saved_folder(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = entrollm.hf.load(coded)
    uploaded: dict[str, Any] = {}

    def upload(folder: str, repo_id: str, **options: Any) -> None:
        with CompressedModel.open(folder) as stored:
            uploaded[repo_id] = dict(stored.specs)

    api = SimpleNamespace(create_repo=lambda name, **options: SimpleNamespace(repo_id=f"me/{name}"))
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: card)
    monkeypatch.setattr(model, "_upload_modified_files", upload)
    model.push_to_hub("coded")
    with CompressedModel.open(coded) as stored:
        assert uploaded == {"me/coded": dict(stored.specs)}


def test_model_without_its_head_finds_its_matrices(coded: Path) -> None:
    base = AutoModel.from_pretrained(coded, dtype=torch.float32)
    whole = entrollm.hf.load(coded, dtype=torch.float32)
    assert isinstance(base.layers[0].self_attn.q_proj, EntroLinear)
    with torch.no_grad():
        assert torch.equal(base(ids()).last_hidden_state, whole.model(ids()).last_hidden_state)


def test_moved_model_is_opened_again(coded: Path) -> None:
    """Entries replaced by equal ones elsewhere, as moves between devices do."""
    model = entrollm.hf.load(coded, dtype=torch.float32)
    expected = logits(model, ids())
    for module in model.modules():
        if isinstance(module, CodedWeight):
            for suffix, entry in module.entries().items():
                setattr(module, suffix[1:], entry.clone())
    assert torch.equal(logits(model, ids()), expected)


def test_kept_matrices_stay_ordinary(coded: Path, tmp_path: Path) -> None:
    from entrollm import CompressOptions, compress

    options = CompressOptions(overrides={"*embed*": None, "*q_proj*": None})
    compress(coded.parent / "source", tmp_path / "kept", options)
    model = entrollm.hf.load(tmp_path / "kept", dtype=torch.float32)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].self_attn.k_proj, EntroLinear)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(entrollm.hf.load(tmp_path / "saved", dtype=torch.float32), ids()), logits(model, ids()))


def test_unregistered_fields_of_the_configuration_survive(coded: Path, tmp_path: Path) -> None:
    shutil.copytree(coded, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["my_note"] = "kept"
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    entrollm.hf.load(tmp_path / "copy").save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["my_note"] == "kept"
