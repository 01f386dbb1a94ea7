"""Split GGUF files are read as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrollm import compress
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.errors import FormatError
from entrollm.files.gguf import open_gguf
from tests.support.gguf_sources import GgufSource, write_gguf
from tests.support.quantized_sources import imported_weights

COUNT = 3


def write_parts(folder: Path, changes: dict[int, dict[str, Any]] | None = None) -> tuple[Path, Any]:
    """The small Llama in three files, and its weights; `changes` go into the metadata of parts."""
    whole = folder / "whole.gguf"
    expected = write_gguf(whole, "Q5_0", {"tokenizer.ggml.pre": "gpt-2"})
    file = open_gguf(whole)
    names = list(file.tensors)
    numbers = {"F32": 0, "F16": 1, "Q5_0": 6}
    for part in range(COUNT):
        values: dict[str, Any] = dict(file.metadata) if part == 0 else {}
        values |= {"split.no": part, "split.count": COUNT, "split.tensors.count": len(names)}
        source = GgufSource(values | (changes or {}).get(part, {}))
        for name in names[part::COUNT]:
            tensor = file.tensors[name]
            source.tensors.append((name, tensor.shape, numbers[tensor.type.name], file.array(name).tobytes()))
        (folder / f"m-0000{part + 1}-of-0000{COUNT}.gguf").write_bytes(source.to_bytes())
    return folder / f"m-00001-of-0000{COUNT}.gguf", expected


def test_parts_are_one_model(tmp_path: Path) -> None:
    first, expected = write_parts(tmp_path)
    with Checkpoint.open(first) as parts, Checkpoint.open(tmp_path / "whole.gguf") as whole:
        assert parts.tensors.keys() == whole.tensors.keys() and parts.config == whole.config
        assert len(parts.files) == COUNT
        assert parts.file_bytes() == sum(path.stat().st_size for path in tmp_path.glob("m-*.gguf"))
    compress(first, tmp_path / "out")
    for name, weights in imported_weights(tmp_path / "out").items():
        np.testing.assert_array_equal(weights, expected[name])


def test_names_may_be_in_capitals(tmp_path: Path) -> None:
    write_parts(tmp_path)
    for part in tmp_path.glob("m-*.gguf"):
        part.rename(tmp_path / part.name.upper())
    Checkpoint.open(tmp_path / "M-00001-OF-00003.GGUF").close()


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first, _ = write_parts(tmp_path)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf: part 2 of 3 is missing; fetch it"):
        Checkpoint.open(first)


def test_the_first_part_is_asked_for(tmp_path: Path) -> None:
    write_parts(tmp_path)
    with pytest.raises(
        FormatError, match=r"it is a later part of a model; name the first part, m-00001-of-00003\.gguf"
    ):
        Checkpoint.open(tmp_path / "m-00003-of-00003.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: {"split.no": 2}}, r"m-00002-of-00003\.gguf: split.no and split.count are 2 and 3, expected 1 and 3"),
        ({2: {"split.count": 4}}, r"m-00003-of-00003\.gguf: split.no and split.count are 2 and 4, expected 2 and 3"),
        ({1: {"general.architecture": "gemma"}}, "general.architecture is 'gemma', and 'llama' in m-00001-of-00003"),
        ({0: {"split.tensors.count": 13}}, "split.tensors.count is 13, but the 3 parts have 12 tensors"),
        ({0: {"split.count": 5}}, "its name does not end in -00001-of"),
        ({0: {"split.count": "x"}}, "split.count is 'x', expected an integer"),
        ({0: {"split.count": 3.0}}, r"00001-of-00003\.gguf: split.count is 3\.0, expected an integer"),
        ({0: {"split.count": [3, 3]}}, r"split.count is .*3.*, expected an integer"),
        ({1: {"split.no": True}}, r"00002-of-00003\.gguf: split.no is True, expected an integer"),
        ({0: {"split.tensors.count": [12]}}, r"split.tensors.count is .*12.*, expected an integer"),
    ],
)
def test_parts_of_other_files_are_refused(changes: dict[int, dict[str, Any]], message: str, tmp_path: Path) -> None:
    first, _ = write_parts(tmp_path, changes)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(first)


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    first, _ = write_parts(tmp_path)
    second = GgufSource({"split.no": 1, "split.count": COUNT})
    name = next(iter(open_gguf(tmp_path / "m-00003-of-00003.gguf").tensors))
    second.tensors.append((name, (1,), 0, bytes(4)))
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(second.to_bytes())
    with pytest.raises(FormatError, match=r"is in m-0000\d-of-00003\.gguf too"):
        Checkpoint.open(first)
