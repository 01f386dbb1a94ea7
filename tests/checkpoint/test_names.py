"""Names and ties of tensors: engine, plugin, live coding and export agree with transformers on what is what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import entrollm
import entrollm.hf
from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.names import canonical_names, natural_key, output_head, text_names
from entrollm.cli.main import app
from entrollm.compress.export import export
from entrollm.engine.check import why_not_run
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format.reader import CompressedModel
from entrollm.format.stored import store_matrix
from entrollm.format.writer import ShardWriter
from entrollm.hf import EntroConfig
from tests.torch.models import ids, write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = [
    EMBEDDING,
    "model.norm.weight",
    HEAD,
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.11.mlp.down_proj.qweight",
    "model.layers.0.input_layernorm.weight",
]


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "language_model.model.",
        "model.language_model.",
        "language_model.",
        "text_model.",
        "text_model.model.",
    ],
)
@pytest.mark.parametrize("head", ["", "language_model.", "text_model."])
def test_every_prefix_gives_the_names_of_a_causal_model(prefix: str, head: str) -> None:
    stored = [head + name if name == HEAD else prefix + name.removeprefix("model.") for name in LLAMA]
    assert dict(canonical_names(stored)) == dict(zip(LLAMA, stored, strict=True))


@pytest.mark.parametrize(
    "other",
    ["vision_tower.layers.0.weight", "model.decoder.embed_tokens.weight", "encoder.layer.0.weight", "layers.0.mlp"],
)
def test_names_of_other_models_stay(other: str) -> None:
    stored = [name.removeprefix("model.") for name in LLAMA] + [other]
    assert dict(canonical_names(stored)) == {name: name for name in stored}


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(FormatError, match=r"'norm\.weight' and 'model\.norm\.weight' are both 'model\.norm\.weight'"):
        canonical_names(["model.norm.weight", "norm.weight"])


def test_a_tied_head_serves_as_the_embedding() -> None:
    assert dict(canonical_names([HEAD], is_tied=True)) == {EMBEDDING: HEAD}
    assert dict(canonical_names([HEAD])) == {HEAD: HEAD}
    for other in ("transformer.wte.weight", "backbone.embeddings.weight"):
        names = text_names([other, HEAD], is_tied=True)
        assert names == {other: other, HEAD: HEAD} and output_head(names, is_tied=True, embedding=other) == HEAD
    assert output_head([EMBEDDING, HEAD], is_tied=True) == HEAD
    assert output_head([EMBEDDING], is_tied=True) == EMBEDDING
    with pytest.raises(FormatError, match=r"lm_head\.weight: the tensor is missing"):
        output_head([EMBEDDING], is_tied=False)


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def _bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _without(name: str, change: Change = lambda tensors: tensors) -> Change:
    return lambda tensors: change({key: tensor for key, tensor in tensors.items() if key != name})


def _same_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, HEAD: tensors[EMBEDDING].clone()}


# Whether config.json ties, and what the files hold, starting from a model with a head of its own.
CASES: dict[str, tuple[bool, Change]] = {
    "untied": (False, lambda tensors: tensors),
    "tied": (True, _without(HEAD)),
    "tied, another head": (True, lambda tensors: tensors),
    "tied, the same head": (True, _same_head),
    "tied, only the head": (True, _without(EMBEDDING)),
    "untied, without prefix": (False, _bare),
    "tied, without prefix": (True, _without(HEAD, _bare)),
    "tied, another head, without prefix": (True, _bare),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("names") / "source", tie_word_embeddings=False)


def _rewrite(source: Path, folder: Path, *, is_tied: bool, change: Change) -> Path:
    folder.mkdir()
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": is_tied}))
    return folder


def _logits(model: object) -> np.ndarray:
    with torch.no_grad():
        return model(ids()).logits[0].float().numpy()  # type: ignore[operator, no-any-return]


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / expected.std())


@pytest.mark.parametrize("name", CASES)
def test_everything_computes_what_transformers_does(name: str, source: Path, tmp_path: Path) -> None:
    is_tied, change = CASES[name]
    folder = _rewrite(source, tmp_path / "model", is_tied=is_tied, change=change)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = _logits(reference)
    tokens = ids()[0].tolist()
    assert why_not_run(folder) is None
    assert _difference(entrollm.load(folder).logits(tokens), expected) < 1e-3
    compress(folder, tmp_path / "coded", CompressOptions(bits=8))
    coded = entrollm.load(tmp_path / "coded").logits(tokens)
    assert _difference(coded, expected) < 0.5
    assert _difference(_logits(entrollm.hf.load(tmp_path / "coded", dtype=torch.float32)), coded) < 1e-2
    with CompressedModel.open(tmp_path / "coded") as model:
        export(model, tmp_path / "exported", _core.ThreadPool(1), "f32")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert _difference(_logits(exported), coded) < 1e-2
    live = AutoModelForCausalLM.from_pretrained(folder, quantization_config=EntroConfig(bits=8), dtype=torch.float32)
    assert _difference(_logits(live), coded) < 1e-2


@pytest.mark.parametrize("keep", [EMBEDDING, HEAD])
def test_a_kept_matrix_and_a_coded_one_are_not_tied(keep: str, source: Path, tmp_path: Path) -> None:
    folder = _rewrite(source, tmp_path / "model", is_tied=True, change=lambda tensors: tensors)
    expected = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    options = EntroConfig(bits=8, keep=[keep]).options()
    compress(folder, tmp_path / "coded", options)
    assert _difference(entrollm.load(tmp_path / "coded").logits(ids()[0].tolist()), expected) < 0.5
    assert _difference(_logits(entrollm.hf.load(tmp_path / "coded", dtype=torch.float32)), expected) < 0.5


def test_equal_matrices_stay_tied_in_the_plugin(source: Path, tmp_path: Path) -> None:
    folder = _rewrite(source, tmp_path / "model", is_tied=True, change=_same_head)
    compress(folder, tmp_path / "coded", CompressOptions(bits=8))
    model = entrollm.hf.load(tmp_path / "coded", dtype=torch.float32)
    coded = [module.name for module in model.modules() if type(module).__name__ == "CodedWeight"]
    assert EMBEDDING in coded
    assert HEAD not in coded


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "text_model."])
def test_the_text_part_of_a_larger_model_runs(prefix: str, source: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name.removeprefix("model.") if name != HEAD else name: t for name, t in tensors.items()}

    folder = _rewrite(source, tmp_path / "model", is_tied=False, change=rename)
    compress(folder, tmp_path / "coded", CompressOptions(bits=8))
    tokens = ids()[0].tolist()
    coded = entrollm.load(tmp_path / "coded").logits(tokens)
    assert _difference(entrollm.load(folder).logits(tokens), entrollm.load(source).logits(tokens)) == 0.0
    assert _difference(_logits(entrollm.hf.load(tmp_path / "coded", dtype=torch.float32)), coded) < 1e-2
    with pytest.raises(UnsupportedError, match="transformers does not find"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=EntroConfig(bits=8))


def test_a_compressed_folder_with_other_names_runs(source: Path, tmp_path: Path) -> None:
    """Folders of earlier versions have the names of their checkpoint."""
    compress(source, tmp_path / "coded", CompressOptions(bits=8))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "coded" / "config.json").read_bytes())
    with (
        CompressedModel.open(tmp_path / "coded") as model,
        ShardWriter(tmp_path / "bare" / "model.safetensors") as writer,
    ):
        for name, spec in model.specs.items():
            writer.add_matrix(store_matrix(name.removeprefix("model."), spec, model.entries(name)))
        for name in model.plain:
            array = model.array(name)
            writer.add_plain(name.removeprefix("model."), model.dtype(name), array.shape, [array])
    found = [entrollm.load(tmp_path / name).logits([3, 4, 5]) for name in ("bare", "coded")]
    np.testing.assert_array_equal(*found)


def test_a_base_model_is_compressed_with_a_warning(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = _rewrite(source, tmp_path / "model", is_tied=False, change=_without(HEAD, _bare))
    assert "base model without an output head" in str(why_not_run(folder))
    found = CliRunner().invoke(app, ["compress", str(folder), "-o", str(tmp_path / "coded"), "--bits", "8"])
    assert found.exit_code == 0
    said = found.output + capfd.readouterr().err
    assert "entrollm run will not load the result: lm_head.weight: the tensor is missing" in said
    with pytest.raises(FormatError, match="base model without an output head"):
        entrollm.load(tmp_path / "coded")


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["a", "layers.1.b", "layers.2.a", "layers.2.b", "layers.10.a", "layers.010.b", "layers.x", "z"]
    assert sorted([*names[4:], *names[:4]], key=natural_key) == names
    assert sorted(["x." + "9" * 5000, "x.2"], key=natural_key) == ["x.2", "x." + "9" * 5000]
