"""Fused experts: tensors of three axes, coded matrix by matrix."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from entrollm import CompressOptions, _core, compress
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.cli.console import describe_error
from entrollm.compress.export import export
from entrollm.compress.stacks import find_stacks
from entrollm.compress.verify import verify
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format import layout
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from tests.support.checkpoints import write_checkpoint
from tests.support.folders import Header, change_header, change_table

STACK, LINEAR = "layers.0.experts.up_proj", "layers.0.gate.weight"


def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(31)
    sizes = np.array([0.02, 0.1, 1.0], np.float32)[:, None, None]
    return {
        STACK: (generator.standard_normal((3, 40, 96)) * sizes).astype(ml_dtypes.bfloat16),
        "layers.0.experts.up_proj_bias": generator.standard_normal((3, 40)).astype(np.float32),
        "layers.0.conv.weight": generator.standard_normal((8, 8, 3)).astype(np.float32),
        LINEAR: generator.standard_normal((3, 96)).astype(np.float32),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", weights())


def test_matrices_of_a_stack_have_grids_of_their_own(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "coded", CompressOptions(bits=8))
    pool = _core.ThreadPool(1)
    with CompressedModel.open(tmp_path / "coded") as model:
        members = [layout.member_name(STACK, index) for index in range(3)]
        assert set(model.specs) == {*members, LINEAR}
        for index, name in enumerate(members):
            alone = write_checkpoint(tmp_path / f"alone{index}", {"w.weight": weights()[STACK][index], "b": np.ones(1)})
            compress(alone, tmp_path / f"coded{index}", CompressOptions(bits=8))
            with CompressedModel.open(tmp_path / f"coded{index}") as other:
                assert np.array_equal(
                    matrix_of(model, name).symbols(0, 40, pool), matrix_of(other, "w.weight").symbols(0, 40, pool)
                )
                assert model.specs[name].kind == other.specs["w.weight"].kind


@pytest.mark.parametrize("options", [CompressOptions(bits=4), CompressOptions(bpw=6.0)], ids=["4", "6.0"])
def test_export_joins_what_was_split(source: Path, tmp_path: Path, options: CompressOptions) -> None:
    compress(source, tmp_path / "coded", options)
    pool = _core.ThreadPool(1)
    with CompressedModel.open(tmp_path / "coded") as model, Checkpoint.open(source) as original:
        assert verify(model, pool, original).compared
        export(model, tmp_path / "exported", pool)
        expected = [matrix_of(model, f"{STACK}.{index}").dequantize(np.arange(40), pool) for index in range(3)]
    with Checkpoint.open(tmp_path / "exported") as exported, Checkpoint.open(source) as original:
        assert {name: (info.dtype, info.shape) for name, info in exported.tensors.items()} == {
            name: (info.dtype, info.shape) for name, info in original.tensors.items()
        }
        assert exported.read(STACK).tobytes() == np.stack(expected).astype(ml_dtypes.bfloat16).tobytes()


def test_kept_stack_stays_whole(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "coded", CompressOptions(overrides={"*experts*": None}))
    with CompressedModel.open(tmp_path / "coded") as model:
        assert model.array(STACK).tobytes() == weights()[STACK].tobytes()


def test_matrices_are_read_by_rows(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        checkpoint.split({STACK: ["a", "b", "c"]})
        assert STACK not in checkpoint.tensors
        assert checkpoint.read("b", 3, 5).tobytes() == weights()[STACK][1, 3:5].tobytes()
        assert np.array_equal(checkpoint.read_float32("c"), weights()[STACK][2].astype(np.float32))
        checkpoint.release("c")
        assert checkpoint.read("a").shape == checkpoint.tensors["a"].shape == (40, 96)


def test_wrong_splits_are_refused(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        with pytest.raises(FormatError, match="has 3 matrices, not 2"):
            checkpoint.split({STACK: ["a", "b"]})
        with pytest.raises(FormatError, match=r"matrix 1 of .* has the name of another tensor, 'layers.0.gate.weight'"):
            checkpoint.split({STACK: ["a", LINEAR, "c"]})


def test_fp8_stack_is_refused(tmp_path: Path) -> None:
    tensors = {STACK: np.ones((2, 4, 64), ml_dtypes.float8_e4m3fn), LINEAR: weights()[LINEAR]}
    source = tmp_path / "source"
    write_checkpoint(source, {name: array.view(np.uint8) for name, array in tensors.items()})
    shard = source / "model-00001-of-00002.safetensors"
    change_header(shard, lambda header: header[STACK].update({"dtype": "F8_E4M3"}))
    change_header(
        source / "model-00002-of-00002.safetensors",
        lambda header: header[LINEAR].update({"dtype": "F32", "shape": [3, 96]}),
    )
    with pytest.raises(
        UnsupportedError, match=r"is F8_E4M3 of three axes, which is not coded; keep it in its type"
    ) as raised:
        compress(source, tmp_path / "coded")
    assert str(raised.value).endswith(f"with keep=['{STACK}']")
    assert describe_error(raised.value).endswith(f"with --keep {STACK}")
    compress(source, tmp_path / "coded", CompressOptions(overrides={"*experts*": None}))


def test_missing_member_is_refused(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "coded", CompressOptions(bits=4))

    def drop(header: Header) -> None:
        # Only its name changes, which leaves a gap in the numbers.
        def rename(table: dict[str, dict[str, str]]) -> None:
            table["coded"][f"{STACK}.999999999"] = table["coded"].pop(f"{STACK}.1")

        change_table(header, rename)
        for suffix in layout.SUFFIXES:
            if f"{STACK}.1{suffix}" in header:
                header[f"{STACK}.999999999{suffix}"] = header.pop(f"{STACK}.1{suffix}")

    shutil.copytree(tmp_path / "coded", tmp_path / "damaged")
    change_header(tmp_path / "damaged" / "model.safetensors", drop)
    with (
        CompressedModel.open(tmp_path / "damaged") as model,
        pytest.raises(FormatError, match=rf"{STACK}\.1 is missing, though {STACK} has later matrices"),
    ):
        export(model, tmp_path / "exported", _core.ThreadPool(1))


def test_names_of_members() -> None:
    assert layout.stack_member("a.experts.up.12") == ("a.experts.up", 12)
    for name in ("a.weight", "a.01", "a.-1", ".3", "7", "a.²", "a.", "a." + "9" * 5000):
        assert layout.stack_member(name) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x.0", "x.1.T"], r"x\.0 and x\.1\.T are matrices of x, of which one is transposed"),
        (["x.0.T", "x.2.T"], r"x\.1\.T is missing, though x has later matrices"),
        (["x.0", "x.2"], r"x\.1 is missing, though x has later matrices"),
        (["x.0", "x.0.T"], r"x\.0\.T and x\.0 are both matrix 0 of x"),
    ],
)
def test_stacks_that_do_not_fit_together_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        find_stacks(names)
