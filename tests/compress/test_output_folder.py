"""The output folder: resumed, locked, replaced, and never half there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entrollm import _core
from entrollm.cli.console import describe_error
from entrollm.compress import CodingOptions, compress_folder, folder
from entrollm.compress.export import export
from entrollm.compress.folder import OutputFolder
from entrollm.compress.progress import CompressProgress
from entrollm.errors import EntroLLMError, FormatError
from entrollm.format.reader import CompressedModel
from entrollm.system import is_mount_point
from tests.support.checkpoints import SHARDS, write_checkpoint

OPTIONS = CodingOptions(shard_bytes=60_000)


class InterruptError(Exception):
    """What an interrupted run raises."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def interrupt_after(tensor: str) -> Callable[[CompressProgress], None]:
    def stop(progress: CompressProgress) -> None:
        if progress.tensor == tensor:
            raise InterruptError

    return stop


def interrupt(checkpoint: Path, out: Path, options: CodingOptions = OPTIONS, overwrite: bool = False) -> None:
    with pytest.raises(InterruptError):
        stop = interrupt_after("head.weight")
        compress_folder(checkpoint, out, options, overwrite=overwrite, on_progress=stop)


def test_an_interrupted_run_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    interrupt(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    finished = list((tmp_path / "out.partial").glob("*.safetensors"))
    assert len(finished) >= 2
    assert list((tmp_path / "out.partial").glob("*.tmp")) == []
    before = {file: file.stat().st_mtime_ns for file in finished}
    seen: list[CompressProgress] = []
    result = compress_folder(checkpoint, tmp_path / "out", OPTIONS, on_progress=seen.append)
    assert result.resumed_weights > 0
    assert seen[0].weights_done > 0 and seen[-1].weights_done == result.quantized_weights
    for file, time in before.items():
        assert (tmp_path / "out" / file.name).stat().st_mtime_ns == time
    whole = compress_folder(checkpoint, tmp_path / "whole", OPTIONS)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    for field in ("weights", "quantized_weights", "file_bytes", "entropy_bits", "huffman_bits", "coded_bits"):
        assert getattr(result, field) == getattr(whole, field)


def test_other_options_start_over(checkpoint: Path, tmp_path: Path) -> None:
    interrupt(checkpoint, tmp_path / "out")
    other = CodingOptions(bits=8, shard_bytes=60_000)
    assert compress_folder(checkpoint, tmp_path / "out", other).resumed_weights == 0
    compress_folder(checkpoint, tmp_path / "whole", other)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_changed_checkpoint_starts_over(checkpoint: Path, tmp_path: Path) -> None:
    interrupt(checkpoint, tmp_path / "out")
    os.utime(checkpoint / SHARDS[0], (1, 1))
    assert compress_folder(checkpoint, tmp_path / "out", OPTIONS).resumed_weights == 0


def test_a_changed_configuration_starts_over(checkpoint: Path, tmp_path: Path) -> None:
    interrupt(checkpoint, tmp_path / "out")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert compress_folder(checkpoint, tmp_path / "out", OPTIONS).resumed_weights == 0


def test_a_run_that_goes_on_has_the_side_files_of_its_source(checkpoint: Path, tmp_path: Path) -> None:
    """Those that were changed, added or removed between the two runs, and those named like its own notes."""
    (checkpoint / "custom").mkdir()
    (checkpoint / "custom" / "code.py").write_text("old")
    interrupt(checkpoint, tmp_path / "out")
    partial = tmp_path / "out.partial"
    for name in ("merges.txt", "tokenizer.json", "custom/code.py", "vocab.json.tmp"):  # by a run that came further
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_text("stale")
    shutil.rmtree(checkpoint / "custom")
    for name in ("tokenizer.json", "plan.json", "model-00001-of-00003.json"):
        (checkpoint / name).write_text('{"new": 1}')
    assert compress_folder(checkpoint, tmp_path / "out", OPTIONS).resumed_weights > 0
    compress_folder(checkpoint, tmp_path / "whole", OPTIONS)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (tmp_path / "out" / "plan.json").read_text() == '{"new": 1}'
    assert not (tmp_path / "out" / "custom").exists()


def test_a_run_stopped_while_it_started_over_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / ".plan.json.tmp").write_text("{")
    compress_folder(checkpoint, tmp_path / "out", OPTIONS)
    assert ".plan.json" not in files(tmp_path / "out")


def test_an_existing_output_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress_folder(checkpoint, out)
    before = files(out)
    message = "out exists; name another folder, or pass overwrite=True to replace it"
    with pytest.raises(ValueError, match=message) as raised:
        compress_folder(checkpoint, out, CodingOptions(bits=8))
    assert describe_error(raised.value).endswith("out exists; name another folder, or pass --overwrite to replace it")
    assert files(out) == before


def test_overwrite_replaces_when_complete(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress_folder(checkpoint, out, OPTIONS)
    before = files(out)
    eight = CodingOptions(bits=8, shard_bytes=60_000)
    interrupt(checkpoint, out, eight, overwrite=True)
    assert files(out) == before
    assert compress_folder(checkpoint, out, eight, overwrite=True).resumed_weights > 0
    with CompressedModel.open(out) as model:
        assert model.specs["head.weight"].grid_name == "paper-asymmetric-8-tensor"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_output_is_never_replaced(checkpoint: Path, tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(ValueError, match="exists and is not a compressed model"):
        compress_folder(checkpoint, checkpoint, overwrite=overwrite)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is a file; name a folder that does not exist yet"):
        compress_folder(checkpoint, tmp_path / "notes", overwrite=overwrite)
    partial = tmp_path / "out.partial"
    for content in ("folder", "file"):
        if content == "folder":
            partial.mkdir()
            (partial / "mine.txt").write_text("mine")
        else:
            shutil.rmtree(partial)
            partial.write_text("mine")
        with pytest.raises(ValueError, match=r"out\.partial is in the way and was not left by an interrupted run"):
            compress_folder(checkpoint, tmp_path / "out", overwrite=overwrite)
    assert partial.read_text() == "mine"


def test_a_leftover_of_a_replacement_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    with pytest.raises(ValueError, match=r"out\.replaced holds an earlier output that a stopped run was replacing"):
        compress_folder(checkpoint, tmp_path / "out")


def test_an_empty_folder_may_be_filled(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    compress_folder(checkpoint, tmp_path / "out")
    assert "config.json" in files(tmp_path / "out")


def test_parents_are_made(checkpoint: Path, tmp_path: Path) -> None:
    compress_folder(checkpoint, tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_two_runs_do_not_write_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    refused = []

    def start_another(_: CompressProgress) -> None:
        if not refused:
            with pytest.raises(
                EntroLLMError, match=r"another run is writing .*out; wait for it or name another folder"
            ):
                compress_folder(checkpoint, tmp_path / "out", OPTIONS)
            refused.append(True)

    compress_folder(checkpoint, tmp_path / "out", OPTIONS, on_progress=start_another)
    assert refused


def test_a_folder_published_while_it_is_opened_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    real_open = os.open

    def open_late(path: Path, *args: int) -> int:
        descriptor = real_open(path, *args)
        if Path(path).name == "out.partial":
            Path(path).rename(out)
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    with pytest.raises(EntroLLMError, match="another run is writing"):
        OutputFolder(out, {}, overwrite=False)


def test_a_failed_publish_gives_up_the_lock(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: OutputFolder) -> None:
        raise OSError(errno.EIO, "disk on fire")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk on fire"):
        patch.setattr(OutputFolder, "publish", fail)
        compress_folder(checkpoint, tmp_path / "out")
    compress_folder(checkpoint, tmp_path / "out")


_COMPRESS = """
import sys, resource, signal
from entrollm.compress import compress_folder
limit = int(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    compress_folder(sys.argv[1], sys.argv[2])
except OSError as error:
    print(error.errno)
"""


def compress_elsewhere(checkpoint: Path, out: Path, file_limit: int = 0) -> int | None:
    """Run in another process; returns the errno of the OSError it met."""
    arguments = [sys.executable, "-c", _COMPRESS, str(checkpoint), str(out), str(file_limit)]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    return int(output) if output else None


def test_a_file_that_cannot_grow_leaves_no_output(checkpoint: Path, tmp_path: Path) -> None:
    assert compress_elsewhere(checkpoint, tmp_path / "out", 50_000) == errno.EFBIG
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()  # there is nothing to go on from
    compress_folder(checkpoint, tmp_path / "out")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs more rights")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_no_output(checkpoint: Path, tiny_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        compress_folder(checkpoint, tiny_disk / "out", OPTIONS)
    assert caught.value.errno == errno.ENOSPC
    assert Path(caught.value.filename).parent == tiny_disk / "out.partial"
    assert describe_error(caught.value).startswith(f"{caught.value.filename}: the disk is full; free some space")
    assert not (tiny_disk / "out").exists()
    assert list((tiny_disk / "out.partial").glob("*.tmp")) == []


def test_files_of_others_are_not_deleted(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress_folder(checkpoint, out, OPTIONS)
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    (out / "adapter_model.safetensors").write_text("mine too")
    before = sorted(path for path in out.rglob("*"))
    message = "which replacing it would delete: adapter_model.safetensors, notes/mine.txt; move or remove them"
    with pytest.raises(ValueError, match=message):
        compress_folder(checkpoint, out, CodingOptions(bits=8), overwrite=True)
    assert sorted(path for path in out.rglob("*")) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    shutil.rmtree(out / "notes")
    (out / "adapter_model.safetensors").unlink()
    (out / ".plan.json").write_text("{}")  # of a run that was stopped when it was all but done
    compress_folder(checkpoint, out, CodingOptions(bits=8), overwrite=True)
    assert not (out / ".plan.json").exists()


def test_many_files_of_others_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    compress_folder(checkpoint, tmp_path / "out")
    for number in range(11):
        (tmp_path / "out" / f"{number:02}.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"delete: 00\.txt, .*, 07\.txt and 3 more; move"):
        compress_folder(checkpoint, tmp_path / "out", overwrite=True)


def test_the_plan_says_what_a_resumed_run_must_share(checkpoint: Path, tmp_path: Path) -> None:
    interrupt(checkpoint, tmp_path / "out")
    plan = json.loads((tmp_path / "out.partial" / ".plan.json").read_text())
    assert plan["format_version"] == 2 and plan["shard_bytes"] == 60_000
    assert set(plan["files"]) == {str((checkpoint / shard).resolve()) for shard in SHARDS}


@pytest.mark.parametrize("change", ["replace", "remove", "touch"])
def test_an_input_that_changes_while_it_is_read_is_an_error(checkpoint: Path, tmp_path: Path, change: str) -> None:
    shard = checkpoint / SHARDS[0]

    def interfere(progress: CompressProgress) -> None:
        if progress.tensor != "head.weight":
            return
        if change == "replace":
            shutil.copyfile(shard, tmp_path / "other")
            (tmp_path / "other").replace(shard)
        elif change == "remove":
            shard.unlink()
        else:
            os.utime(shard, (1, 1))

    message = "was removed while it was compressed" if change == "remove" else "changed while it was compressed; run"
    with pytest.raises(EntroLLMError, match=rf"{SHARDS[0]} {message}"):
        compress_folder(checkpoint, tmp_path / "out", OPTIONS, on_progress=interfere)
    assert not (tmp_path / "out").exists()


def test_a_mount_point_is_refused_before_work_begins(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out put"
    out.mkdir()
    table = tmp_path / "mountinfo"
    table.write_text(f"36 35 98:0 /a {str(out).replace(' ', chr(92) + '040')} rw - ext4 /dev/root rw\n")
    monkeypatch.setattr(folder, "is_mount_point", lambda path: is_mount_point(path, table))
    with pytest.raises(ValueError, match="out put is a mount point, which cannot be renamed; name a folder in it"):
        compress_folder(checkpoint, out)
    assert not (tmp_path / "out put.partial").exists()
    compress_folder(checkpoint, out / "model")


def test_side_files_are_synced(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text("{}")
    synced = set()
    sync = os.fsync

    def remember(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", remember)
    compress_folder(checkpoint, tmp_path / "out")
    missed = [path for path in (tmp_path / "out").rglob("*") if path.stat().st_ino not in synced]
    assert missed == []
    with CompressedModel.open(tmp_path / "out") as model:
        export(model, tmp_path / "exported", _core.ThreadPool(1))
    missed = [path for path in (tmp_path / "exported").rglob("*") if path.stat().st_ino not in synced]
    assert missed == []


def test_an_output_that_is_a_link_stays_one(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    compress_folder(checkpoint, tmp_path / "out", CodingOptions(bits=4))
    compress_folder(checkpoint, tmp_path / "out", CodingOptions(bits=5), overwrite=True)
    assert (tmp_path / "out").is_symlink()
    with CompressedModel.open(tmp_path / "disk") as model:
        assert model.config["quantization_config"]["bits"] == 5
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != checkpoint.name) == ["disk", "out"]


def test_a_link_to_nothing_gets_its_target(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "deep")
    compress_folder(checkpoint, tmp_path / "out", CodingOptions(bits=4))
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "deep" / "config.json").is_file()


def test_a_link_to_a_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "out").symlink_to(tmp_path / "file")
    with pytest.raises(ValueError, match="is a file; name a folder that does not exist yet"):
        compress_folder(checkpoint, tmp_path / "out", CodingOptions(bits=4))


@pytest.mark.parametrize("name", [".", "..", "{tmp}"])
def test_the_current_folder_is_refused(
    name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the current folder or holds it; name another folder"):
        compress_folder(checkpoint, Path(name.format(tmp=tmp_path)), CodingOptions(bits=4))


def test_an_error_while_folders_change_places_puts_the_earlier_output_back(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot let them do so in one step."""
    out = tmp_path / "out"
    compress_folder(checkpoint, out, OPTIONS)
    before = files(out)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return rename(path, target)

    monkeypatch.setattr(folder, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        compress_folder(checkpoint, out, CodingOptions(bits=8), overwrite=True)
    assert files(out) == before


@pytest.mark.parametrize("is_export", [False, True])
def test_what_a_run_left_beside_its_output_goes_with_the_next_call(
    checkpoint: Path, tmp_path: Path, is_export: bool
) -> None:
    """A run that was killed between its last rename and the removal of its plan."""
    compress_folder(checkpoint, tmp_path / "out", OPTIONS)
    (tmp_path / ".out.publishing.json").write_text("{}")
    with pytest.raises(ValueError, match="out exists"):
        if is_export:
            with CompressedModel.open(tmp_path / "out") as model:
                export(model, tmp_path / "out", _core.ThreadPool(1))
        else:
            compress_folder(checkpoint, tmp_path / "out", OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_tidying_that_fails_is_no_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    compress_folder(checkpoint, out, OPTIONS)
    with monkeypatch.context() as changed:
        changed.setattr(folder, "sync_folder", lambda _: (_ for _ in ()).throw(PermissionError(errno.EACCES, "x")))
        compress_folder(checkpoint, out, CodingOptions(bits=8), overwrite=True)
    assert f"{out} is complete, but tidying up after it failed" in caplog.text
    compress_folder(checkpoint, out, OPTIONS, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_a_place_where_nothing_can_be_made(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before long work, such as calibration."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    for out, message in (
        ("loop", "loop is a link that leads back to itself"),
        ("loop/out", "loop is not a folder"),
        ("file/out", "file is not a folder, so .*out cannot be made"),
        ("file/deep/out", "file is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            folder.check_output(tmp_path / out, overwrite=False)
    with monkeypatch.context() as changed:  # root may write everywhere
        changed.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(ValueError, match=r"may not be written, so .*out cannot be made there"):
            folder.check_output(tmp_path / "new" / "out", overwrite=False)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ValueError, match="the current folder was removed"):
        compress_folder(checkpoint, Path("out"))


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json"])
def test_a_pointer_of_git_in_place_of_a_file_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(FormatError, match=f"{name} is a Git LFS pointer"):
        compress_folder(checkpoint, tmp_path / "out", OPTIONS)
