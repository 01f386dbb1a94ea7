"""Records of finished shards, which a later run resumes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entrollm.compress import CodingOptions, CompressProgress, compress_folder
from entrollm.compress.shard import MatrixRecord, ShardRecord
from entrollm.errors import FormatError
from tests.support.checkpoints import write_checkpoint

RECORD = ShardRecord(
    file="model-00001-of-00002.safetensors",
    file_bytes=640,
    kept_bytes=12,
    entries=("a.weight.coded", "norm.weight"),
    matrices={
        "a.weight": MatrixRecord(
            weights=64, stored_bytes=333, entropy_bits=3.25, huffman_bits=1 / 3, relative_error=0.0
        )
    },
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(RECORD.to_json())
    assert ShardRecord.read(path) == RECORD
    assert RECORD.coded_weights == 64


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.update(changes)


def changed_matrix(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["matrices"]["a.weight"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("entries"), "expected the keys file, file_bytes, kept_bytes, entries, matrices"),
        (changed(more=1), "expected the keys file, "),
        (changed(file=1), "file is 1"),
        (changed(file_bytes=-1), "file_bytes is -1"),
        (changed(kept_bytes=True), "kept_bytes is True"),
        (changed(kept_bytes=1.0), r"kept_bytes is 1\.0"),
        (changed(entries=["a", 1]), "entries must be names"),
        (changed(matrices={"a.weight": 1}), "expected the keys weights, "),
        (changed_matrix(more=1), "expected the keys weights, "),
        (changed_matrix(entropy_bits="3"), "entropy_bits is '3'"),
        (changed_matrix(stored_bytes=None), "stored_bytes is None"),
    ],
)
def test_a_malformed_record_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    record = json.loads(RECORD.to_json())
    change(record)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    with pytest.raises(FormatError, match=rf"record\.json: {message}.*; remove .* to start over"):
        ShardRecord.read(path)


def test_a_record_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(FormatError, match=r"record\.json: the record of a shard is not valid JSON"):
        ShardRecord.read(tmp_path / "record.json")


def test_a_shard_that_is_not_the_one_of_its_record_is_refused(tmp_path: Path) -> None:
    class InterruptError(Exception):
        pass

    def stop(progress: CompressProgress) -> None:
        if progress.tensor == "head.weight":
            raise InterruptError

    source, options = write_checkpoint(tmp_path / "model"), CodingOptions(shard_bytes=60_000)
    with pytest.raises(InterruptError):
        compress_folder(source, tmp_path / "out", options, on_progress=stop)
    shard = min((tmp_path / "out.partial").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(FormatError, match=r"is not the file of its record; remove .*out\.partial to start over"):
        compress_folder(source, tmp_path / "out", options)
