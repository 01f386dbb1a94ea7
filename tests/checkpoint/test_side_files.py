"""Which files travel with a model and which do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.checkpoint.side_files import WEIGHT_SUFFIXES, side_files, tokenizer_files
from entrollm.compress.export import export
from entrollm.errors import FormatError
from entrollm.format.checksums import CHECKSUMS_NAME
from entrollm.format.reader import CompressedModel

CARRIED = [
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "README.md",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "configuration_model.py",
    "custom/nested/code.py",
    "generation_config.json",
    "image.png",
    "merges.txt",
    "modeling_model.py",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
]
LEFT = [
    *(f"other{suffix}" for suffix in WEIGHT_SUFFIXES),
    "onnx/model.onnx",
    "original/consolidated.safetensors",
    ".gitattributes",
    ".cache/huggingface/x.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "checkpoint-100/trainer_state.json",
    "runs/events",
]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


def write_model(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, *names)
    save_file({"a.weight": np.ones((4, 8), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def names_of(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_everything_but_weights_travels(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", *CARRIED, *LEFT)
    assert [file.relative_to(source).as_posix() for file in side_files(source)] == sorted([*CARRIED, "config.json"])
    compress(source, tmp_path / "out", CompressOptions(bits=8))
    assert names_of(tmp_path / "out") == sorted([*CARRIED, "config.json", CHECKSUMS_NAME, "model.safetensors"])
    with CompressedModel.open(tmp_path / "out") as model:
        export(model, tmp_path / "exported", _core.ThreadPool(1))
    assert names_of(tmp_path / "exported") == sorted([*CARRIED, "config.json", "model.safetensors"])
    for name in CARRIED:
        assert (tmp_path / "exported" / name).read_text() == f"content of {name}"


def test_layers_after_the_main_model_travel_with_their_weights(tmp_path: Path) -> None:
    weights = ["2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"]
    source = write_model(tmp_path / "source", "1_Pooling/config.json", *weights, "onnx/model.safetensors")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Dense"}]
    (source / "modules.json").write_text(json.dumps(modules))
    found = [file.relative_to(source).as_posix() for file in side_files(source)]
    assert found == ["1_Pooling/config.json", *weights, "config.json", "modules.json"]


@pytest.mark.parametrize("text", ["{", "3", '[{"type": "x"}]', '["x"]'])
def test_malformed_modules_are_refused(text: str, tmp_path: Path) -> None:
    (write_model(tmp_path) / "modules.json").write_text(text)
    with pytest.raises(FormatError, match=r"modules\.json: expected a list of modules"):
        side_files(tmp_path)


def test_only_a_tokenizer_is_taken_from_another_folder(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "README.md", "tokenizer.json", "preprocessor_config.json", "old.py")
    others = ["README.md", "modeling.py", "tokenizer.json", "tokenizer_config.json"]
    others.append("additional_chat_templates/a.jinja")
    tokenizer = write(tmp_path / "tokenizer", *others)
    assert [file.name for file in tokenizer_files(tokenizer)] == ["a.jinja", "tokenizer.json", "tokenizer_config.json"]
    (tokenizer / "tokenizer.json").write_text("the other one")
    compress(source, tmp_path / "out", CompressOptions(bits=8, tokenizer=tokenizer))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the other one"
    assert (tmp_path / "out" / "README.md").read_text() == "content of README.md"
    assert (tmp_path / "out" / "additional_chat_templates" / "a.jinja").is_file()
    assert not (tmp_path / "out" / "modeling.py").exists()


def test_a_run_with_another_plan_clears_subfolders(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "custom/code.py")
    partial = tmp_path / "out.partial"
    write(partial, ".plan.json", "custom/old.py", "model.safetensors")
    compress(source, tmp_path / "out", CompressOptions(bits=8))
    assert names_of(tmp_path / "out") == ["config.json", "custom/code.py", CHECKSUMS_NAME, "model.safetensors"]


@pytest.mark.parametrize("name", ["tokenizer.json", "sub/code.py"])
def test_a_side_file_that_links_out_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = write_model(tmp_path / "m", "sub/other.py")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(FormatError, match=rf"{name} is a link to .*secret, outside of the checkpoint"):
        Checkpoint.open(folder).side_files()


def test_folders_that_are_links_are_not_entered(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "secret.json")
    folder = write_model(tmp_path / "m")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert [file.name for file in side_files(folder)] == ["config.json"]


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    write_model(snapshot)
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/1"))
    assert "tokenizer.json" in [file.name for file in Checkpoint.open(snapshot).side_files()]
