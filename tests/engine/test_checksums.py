"""Damage is found before its numbers are used: small files and headers at load, matrices before their first product."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from entrollm import CompressOptions, CorruptStreamError, EntroLLMError, FormatError, _core, compress, load
from entrollm.cli.main import app
from entrollm.compress.export import export
from entrollm.engine.memory import Memory
from entrollm.files.safetensors import open_safetensors
from entrollm.format.checksums import CHECKSUMS_NAME
from entrollm.format.reader import CompressedModel
from tests.support.folders import read_safetensors
from tests.support.paths import TINY_LLAMA

IDS = [1, 17, 30]
EMBEDDING, PROJECTION = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checksums") / "coded"
    compress(TINY_LLAMA, path, CompressOptions(bpw=4, threads=1))
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "coded"))


@pytest.fixture(scope="module")
def expected(original: Path) -> bytes:
    return load(original, threads=1, memory="file").logits(IDS).tobytes()


def weights_file(folder: Path) -> Path:
    return folder / "model.safetensors"


def flip(path: Path, at: int, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def flip_in(folder: Path, entry: str) -> None:
    found = open_safetensors(weights_file(folder)).tensors[entry]
    flip(weights_file(folder), (found.begin + found.end) // 2)


def damage_unseen(folder: Path) -> None:
    """Flip a bit of a matrix that decodes all the same."""
    begin = open_safetensors(weights_file(folder)).tensors[PROJECTION + ".coded"].begin
    content = weights_file(folder).read_bytes()
    with CompressedModel.open(folder, check=False) as model:
        dense, sparse, _ = model.specs[PROJECTION].parts or (0, 0, 0)
    for at in range(begin + dense + sparse - 1, begin, -sparse // 100):
        flip(weights_file(folder), at)
        try:
            load(folder, threads=1, memory="file", check=False).logits(IDS)
        except CorruptStreamError:
            weights_file(folder).write_bytes(content)
        else:
            return
    raise AssertionError("every flip is found by decoding")


@pytest.mark.parametrize("memory", ["file", "fast"])
@pytest.mark.parametrize("name", [EMBEDDING, PROJECTION])
def test_a_damaged_matrix_never_multiplies(folder: Path, name: str, memory: Memory) -> None:
    flip_in(folder, name + ".coded")
    model = load(folder, threads=2, memory=memory)
    for _ in range(2):
        with pytest.raises(CorruptStreamError, match=rf"model\.safetensors: the bytes of '{name}' have CRC-32"):
            model.logits(IDS)


def test_the_thread_that_runs_ahead_checks_every_matrix(folder: Path, expected: bytes) -> None:
    model = load(folder, threads=1, memory="file")
    for thread in threading.enumerate():
        if thread.name == "entrollm-prepare":
            thread.join()
    damage_unseen(folder)  # too late to be seen: the map shows it, but all checks are done
    assert model.logits(IDS).tobytes() != expected


def test_a_damaged_kept_tensor_is_refused_at_load(folder: Path) -> None:
    flip_in(folder, "model.norm.weight")
    with pytest.raises(CorruptStreamError, match=r"the bytes of 'model\.norm\.weight' have CRC-32"):
        load(folder)
    load(folder, check=False)


def test_without_checks_damage_is_not_looked_for(folder: Path, expected: bytes) -> None:
    damage_unseen(folder)
    assert load(folder, check=False, memory="file").logits(IDS).tobytes() != expected


def test_the_type_of_a_kept_tensor_is_covered(folder: Path) -> None:
    header, data = read_safetensors(weights_file(folder))
    dtype = header["model.norm.weight"]["dtype"]
    content = weights_file(folder).read_bytes()
    text = content[: len(content) - len(data)]
    at = text.index(b'"model.norm.weight":{"dtype":"' + dtype.encode())
    other = {"BF16": "I16", "F16": "U16", "F32": "I32"}[dtype]
    changed = text[:at] + text[at:].replace(f'"{dtype}"'.encode(), f'"{other}"'.ljust(len(dtype) + 2).encode(), 1)
    weights_file(folder).write_bytes(changed + data)
    message = r"model\.safetensors: its header has CRC-32 .*, entrollm_checksums\.json has"
    with pytest.raises(CorruptStreamError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", CHECKSUMS_NAME])
def test_every_flip_in_a_small_file_is_refused(folder: Path, name: str, expected: bytes) -> None:
    path = folder / name
    content = path.read_bytes()
    generator = np.random.default_rng(5)
    for at in generator.integers(0, len(content), 40):
        flip(path, int(at), int(generator.integers(8)))
        try:
            found = load(folder, threads=1, memory="file").logits(IDS).tobytes()
        except EntroLLMError as error:
            assert str(folder) in str(error)
        else:
            # The list loses a line when the name of its file is damaged; what the model computes stays the same.
            assert name == CHECKSUMS_NAME and found == expected
        path.write_bytes(content)


def test_edited_files_pass_and_edits_that_look_like_damage_say_how_to_go_on(folder: Path) -> None:
    path, listed = folder / "config.json", folder / CHECKSUMS_NAME
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"rope_theta": 5000}))
    assert path.stat().st_size != len(text)
    load(folder)
    path.write_text(text.replace('"rms_norm_eps": 1', '"rms_norm_eps": 2'))
    assert path.stat().st_size == len(text) and path.read_text() != text
    message = (
        r"config\.json: it has CRC-32 .*; if you changed it yourself, remove its line from entrollm_checksums\.json"
    )
    with pytest.raises(CorruptStreamError, match=message):
        load(folder)
    values = json.loads(listed.read_text())
    del values["files"]["config.json"]
    listed.write_text(json.dumps(values))
    load(folder)


def test_shards_of_another_compression_are_refused(folder: Path, tmp_path: Path) -> None:
    compress(TINY_LLAMA, tmp_path / "other", CompressOptions(bits=3, measure=False))
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    message = r"model\.safetensors: it has \d+ bytes, entrollm_checksums\.json has \d+; .* remove its line"
    with pytest.raises(CorruptStreamError, match=message):
        load(folder)
    load(folder, check=False)


def test_files_may_be_removed(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert load(folder).tokenizer is None


def test_model_cards_may_change(folder: Path) -> None:
    (folder / "README.md").write_text("my model")
    load(folder)


def test_folders_without_checksums_are_read(folder: Path, expected: bytes) -> None:
    (folder / CHECKSUMS_NAME).unlink()
    assert load(folder, threads=1, memory="file").logits(IDS).tobytes() == expected


def _item(values: str) -> str:
    return f'{{"files": {{"config.json": {{"bytes": {values}}}}}, "headers": {{}}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object"),
        ('{"files": {}}', "expected the objects 'files' and 'headers'"),
        ('{"files": {"../config.json": {}}, "headers": {}}', "is not a file of the folder"),
        ('{"files": {"/etc/passwd": {}}, "headers": {}}', "is not a file of the folder"),
        ('{"files": {"config.json": null}, "headers": {}}', "must have the integer bytes and crc32, found None"),
        (_item('"1", "crc32": "00000000"'), "must have the integer bytes and crc32"),
        (_item('-1, "crc32": "00000000"'), "must have the integer bytes and crc32"),
        (_item('1, "crc32": "0"'), "must be 8 hex digits, found '0'"),
        (_item('1, "crc32": null'), "must be 8 hex digits, found None"),
    ],
)
def test_a_malformed_list_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / CHECKSUMS_NAME).write_text(text)
    with pytest.raises(FormatError, match=message):
        load(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path)], ids=["folder", "pipe"])
def test_what_is_no_file_is_not_read(folder: Path, check: bool, make: Callable[[Path], None]) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "added_tokens.json"]
    names += ["special_tokens_map.json", "chat_template.jinja", "chat_template.json"] + [CHECKSUMS_NAME] * check
    for name in names:
        path = folder / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(FormatError, match=f"{re.escape(name)} is not a file that holds data"):
            load(folder, check=check)
        path.rmdir() if path.is_dir() else path.unlink()
        if kept is not None:
            path.write_bytes(kept)


def test_export_refuses_damage(folder: Path, tmp_path: Path) -> None:
    flip_in(folder, PROJECTION + ".coded")
    with CompressedModel.open(folder) as model, pytest.raises(CorruptStreamError, match=PROJECTION):
        export(model, tmp_path / "out", _core.ThreadPool(1))
    assert not (tmp_path / "out").exists()


def test_the_list_does_not_travel(folder: Path, tmp_path: Path) -> None:
    with CompressedModel.open(folder) as model:
        export(model, tmp_path / "out", _core.ThreadPool(1))
    assert not (tmp_path / "out" / CHECKSUMS_NAME).exists()


def test_the_command_line_can_leave_checks_out(folder: Path) -> None:
    damage_unseen(folder)
    arguments = ["run", str(folder), "-p", "The", "--max-tokens", "2"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert f"the bytes of '{PROJECTION}' have CRC-32" in " ".join(refused.stderr.split())
    assert CliRunner().invoke(app, [*arguments, "--no-check"]).exit_code == 0
