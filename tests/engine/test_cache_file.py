"""Caches in files: what they give back, and which files are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from entrollm import CorruptStreamError, FormatError, Model, load
from entrollm.cli.main import app
from entrollm.engine import cache_file
from tests.engine.architectures import random_ids
from tests.support.paths import TINY_LLAMA

PROMPT = random_ids(60, seed=5)


def saved(model: Model, path: Path) -> Path:
    cache = model.new_cache()
    assert model.prefill(PROMPT, cache) == len(PROMPT) - 1
    model.save_cache(cache, path)
    return path


@pytest.mark.parametrize(
    ("name", "cache_type"),
    [("mistral-window", "int8"), ("lfm2", "f16"), ("phi3-longrope", "f32"), ("deepseek_v3", "f32")],
)
def test_a_restored_cache_goes_on_with_the_same_bits(
    name: str, cache_type: str, coded_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    first = load(coded_folder(name), threads=1, cache_type=cache_type)
    path = saved(first, tmp_path / "prompt.cache")
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.cache"]
    model = load(coded_folder(name), threads=1, cache_type=cache_type)
    cache = model.restore_cache(path)
    assert model.prefill(PROMPT, cache) == 0
    stream = model.stream(PROMPT, cache=cache, max_tokens=8)
    list(stream)
    other = first.new_cache()
    first.prefill(PROMPT, other)
    expected = first.stream(PROMPT, cache=other, max_tokens=8)
    list(expected)
    assert stream.result.token_ids == expected.result.token_ids


def test_a_beginning_of_a_long_sequence_keeps_its_rotations(
    coded_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The keys of longrope's long sequences stay as they are when the cache goes back."""
    model = load(coded_folder("phi3-longrope"), threads=1)
    path, cache = saved(model, tmp_path / "prompt.cache"), model.new_cache()
    model.prefill(PROMPT, cache)
    short = PROMPT[:20]
    assert model.prefill(short, cache) == 0
    assert cache.length == 19 and cache.is_long
    model.save_cache(cache, path)
    restored = model.restore_cache(path)
    assert restored.is_long
    np.testing.assert_array_equal(model.logits(short, last=1, cache=restored), model.logits(short, last=1))


def test_files_of_the_user_stay_as_they_are(coded_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(coded_folder("llama"), threads=1)
    kept, other = tmp_path / "prompt.cache.tmp", tmp_path / "other"
    other.write_text("mine")
    kept.symlink_to(other)
    path = saved(model, tmp_path / "prompt.cache")
    assert kept.is_symlink() and other.read_text() == "mine"
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "prompt.cache", "prompt.cache.tmp"]


def test_a_prompt_that_fills_the_context_is_not_run(coded_folder: Callable[[str], Path]) -> None:
    model = load(coded_folder("llama"), threads=1)
    prompt = [1] * model.config.context_length
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens and leaves no room for an answer"):
        model.prefill(prompt, model.new_cache())


def test_an_empty_cache_is_not_saved(coded_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(coded_folder("llama"), threads=1)
    with pytest.raises(ValueError, match="the cache holds no tokens; run the model on a prompt first"):
        model.save_cache(model.new_cache(), tmp_path / "empty.cache")
    (tmp_path / "short.cache").write_bytes(b"short")
    with pytest.raises(FormatError, match=r"short\.cache is not a cache, or is damaged; delete it"):
        model.restore_cache(tmp_path / "short.cache")


def test_other_models_types_and_files_are_refused(coded_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(coded_folder("mistral-window"), threads=1)
    path = saved(model, tmp_path / "prompt.cache")
    with pytest.raises(FormatError, match=r"prompt.cache is the cache of another model \(\w{16}, this one is \w{16}\)"):
        load(coded_folder("lfm2"), threads=1).restore_cache(path)
    with pytest.raises(FormatError, match="holds keys and values as 'f32', and f16 is asked for"):
        load(coded_folder("mistral-window"), threads=1, cache_type="f16").restore_cache(path)
    with pytest.raises(FormatError, match=r"expected a cache \(entrollm cache 2\), found format"):
        model.restore_cache(next(coded_folder("lfm2").glob("*.safetensors")))


def test_damaged_and_hostile_files_are_refused(coded_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = load(coded_folder("mistral-window"), threads=1)
    path = saved(model, tmp_path / "prompt.cache")
    intact = path.read_bytes()
    for place in (len(intact) - 1, len(intact) // 2):
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        with pytest.raises(CorruptStreamError, match=r"prompt\.cache: its arrays have CRC-32"):
            model.restore_cache(path)
    for size in (0, 7, 100, len(intact) - 1):
        path.write_bytes(intact[:size])
        with pytest.raises(FormatError, match=r"prompt\.cache"):
            model.restore_cache(path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("layers.0.keys", np.zeros((1, 16, 20), np.float32), "layer 0: it holds 20 of 59 positions"),
        ("layers.0.values", np.zeros((1, 2, 3), np.float32), r"layer 0: values is float32 \[1, 2, 3\], expected"),
        ("layers.1.scales", np.zeros(3, np.float32), "layer 1: expected keys, values, found keys, scales, values"),
        ("layers.9.keys", np.zeros(3, np.float32), "'layers.9.keys' is not part of the cache"),
        ("ids", np.full(59, 10**6), "a token id is outside the vocabulary"),
        ("ids", np.zeros((1, 59), np.int64), "expected token ids as one axis of I64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    name: str,
    array: np.ndarray,
    message: str,
    coded_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files with a checksum that fits, as an attacker writes them."""
    model = load(coded_folder("llama"), threads=1)
    checksum, build = cache_file._checksum, cache_file.build_header
    changed: dict[str, np.ndarray] = {}

    def note(arrays: dict[str, np.ndarray]) -> int:
        if not changed:
            arrays[name] = array
            changed.update(arrays)
        return checksum(arrays)

    def header(entries: object, metadata: dict[str, str]) -> bytes:
        types = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}
        files = [cache_file.FileEntry(key, types[each.dtype], each.shape, each.nbytes) for key, each in changed.items()]
        return build(files, metadata)

    monkeypatch.setattr(cache_file, "_checksum", note)
    monkeypatch.setattr(cache_file, "build_header", header)
    path = saved(model, tmp_path / "prompt.cache")
    with pytest.raises(FormatError, match=message):
        model.restore_cache(path)


def test_the_command_keeps_and_reuses_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "story.cache"

    def run(prompt: str) -> str:
        result = CliRunner().invoke(app, ["run", str(TINY_LLAMA), "-p", prompt, "-n", "4", "--cache", str(file)])
        assert result.exit_code == 0, result.output
        return " ".join(result.stderr.split())

    assert "story.cache: 0 of" in run("Once upon a time there was")
    size = file.stat().st_size
    assert "story.cache: 0 of" not in run("Once upon a time there was a king")
    assert file.stat().st_size > size
    before = file.read_bytes()
    assert "holds another prompt and stays as it is" in run("In the beginning")
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("no folder/a.cache", [], "there is no folder"),
        (".", [], "is not a file; name another one"),
        ("a.cache", ["--top-p", "7"], "top_p should be from 0 to 1"),
    ],
)
def test_the_command_checks_first(
    file: str, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "prefill", lambda *_: pytest.fail("the prompt was run"))
    command = ["run", str(TINY_LLAMA), "-p", "The king", "--cache", str(tmp_path / file), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
