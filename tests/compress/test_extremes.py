"""Weights at the ends of their types: coded with the error that is stored, or refused by name, without a warning."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from entrollm import _core
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress import CodingOptions, compress_folder, plan
from entrollm.compress.verify import verify
from entrollm.errors import FormatError
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of
from entrollm.quantize import BitsOverride
from entrollm.quantize.ecsq import EcsqQuantizer
from entrollm.quantize.feedback import FeedbackQuantizer
from entrollm.quantize.gptq import GptqQuantizer
from entrollm.quantize.method import ArraySource, sum_of_squares

ROWS, COLUMNS = 48, 96
BASE = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
FREE, TENSOR = CodingOptions(), CodingOptions(bits=4)
OPTIONS = {
    "free": FREE,
    "paper": TENSOR,
    "rows": CodingOptions(bits=2, granularity="row"),
    "8": CodingOptions(bits=8),
}
BF16 = ml_dtypes.bfloat16


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def by_row(*factors: float) -> NDArray[np.float64]:
    """The Gaussian matrix with some of its first rows scaled."""
    scaled = BASE.copy()
    for row, factor in enumerate(factors):
        scaled[row] *= factor
    return scaled


def with_one(value: float) -> NDArray[np.float64]:
    """The Gaussian matrix with one other weight."""
    changed = BASE.copy()
    changed[3, 5] = value
    return changed


def write(folder: Path, weights: NDArray[Any]) -> Path:
    folder.mkdir()
    save_file({"w.weight": weights, "v.weight": BASE.astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def check(source: Path, out: Path, options: CodingOptions) -> float:
    """Compress, verify, and compare the stored error with the true one, which is returned."""
    result = compress_folder(source, out, options)
    assert json.dumps(result.to_json(), allow_nan=False)
    with CompressedModel.open(out) as model, Checkpoint.open(source) as original:
        verify(model, _core.ThreadPool(1), original)
        found = matrix_of(model, "w.weight").dequantize(np.arange(ROWS), _core.ThreadPool(1)).astype(np.float64)
        wanted = original.read("w.weight").astype(np.float64)
        largest = np.abs(wanted).max() or 1.0
        error, energy = np.square((found - wanted) / largest).sum(), np.square(wanted / largest).sum()
        true = math.sqrt(error / energy) if energy else 0.0
        assert model.specs["w.weight"].relative_error == pytest.approx(true, rel=2e-3, abs=1e-5)
    return true


HELD: dict[str, tuple[Any, NDArray[np.float64]]] = {
    "a row at 1e19": (np.float32, by_row(1e19)),
    "rows at both ends": (np.float32, by_row(1e30, 1e-30)),
    "all at 1e30": (np.float32, BASE * 1e30),
    "all at 1e-22": (np.float32, BASE * 1e-22),
    "all at 1e-30": (BF16, BASE * 1e-30),
    "a weight of 1e30": (np.float32, with_one(1e30)),
    "every size": (np.float32, BASE * 10.0 ** np.linspace(-40, 37, ROWS)[:, None]),
    "columns of every size": (BF16, BASE * 10.0 ** np.linspace(-20, 15, COLUMNS)),
    "float64 that float32 holds": (np.float64, by_row(1e25, 1e-300)),
    "the largest float16": (np.float16, BASE * 1e4),
    "denormal float16": (np.float16, BASE * 1e-6),
    "zeros": (np.float32, np.zeros((ROWS, COLUMNS))),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", HELD)
def test_the_stored_error_is_the_true_one(name: str, options: CodingOptions, tmp_path: Path) -> None:
    dtype, weights = HELD[name]
    true = check(write(tmp_path / "source", weights.astype(dtype)), tmp_path / "out", options)
    if options is FREE:
        assert true < 0.12


@pytest.mark.parametrize("options", [value for value in OPTIONS.values() if value is not FREE])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("share", [1.0, 0.02, 0.001])
def test_grids_of_the_paper_hold_denormals(options: CodingOptions, dtype: Any, share: float, tmp_path: Path) -> None:
    smallest = float(np.finfo(np.float32).tiny) * share  # the same for bfloat16
    check(write(tmp_path / "source", (BASE * smallest).astype(dtype)), tmp_path / "out", options)


F32_MAX = float(np.finfo(np.float32).max)
SIGNS = np.where(BASE > 0, 1.0, -1.0)
REFUSED: dict[str, tuple[CodingOptions, Any, NDArray[np.float64], str]] = {
    "float32 ends": (FREE, np.float32, with_one(F32_MAX), "too near the end of float32's range for bpw and size"),
    "one constant": (FREE, np.float32, np.full((ROWS, COLUMNS), F32_MAX), "too near the end of float32's range"),
    "both ends, free": (FREE, BF16, SIGNS * 3.3e38, "too near the end of float32's range"),
    "both ends": (TENSOR, np.float32, SIGNS * F32_MAX, "its weights span -3.* which is wider than float32"),
    "denormals": (FREE, np.float32, BASE * 1e-42, "its weights, of size .* are too small for free steps"),
    "float64, too large": (TENSOR, np.float64, with_one(-1e300), "is float64 and has -1e.300 in row 3, beyond float32"),
    "float64, too large, free": (FREE, np.float64, BASE * 1e300, "is float64 and has .* in row 0, beyond float32"),
    "float64, too small": (TENSOR, np.float64, BASE * 1e-300, "its weights are float64, and too small for float32"),
    "float64, too small, free": (FREE, np.float64, BASE * 1e-50, "its weights are float64, and too small for float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_float32_cannot_hold_is_refused_and_can_be_kept(name: str, tmp_path: Path) -> None:
    options, dtype, weights, message = REFUSED[name]
    source = write(tmp_path / "source", weights.astype(dtype))
    with pytest.raises(FormatError, match=rf"w\.weight.*{message}.*keep=\['w\.weight'\]"):
        compress_folder(source, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    kept = compress_folder(source, tmp_path / "kept", CodingOptions(overrides=(BitsOverride("w.weight", None),)))
    assert kept.worst is not None and kept.worst.name == "v.weight"
    with CompressedModel.open(tmp_path / "kept") as model, Checkpoint.open(source) as original:
        verify(model, _core.ThreadPool(1), original)


def test_a_plan_refuses_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "source", with_one(F32_MAX).astype(np.float32))
    with pytest.raises(FormatError, match=r"w\.weight.*too near the end of float32"):
        plan(source, FREE)


@pytest.mark.parametrize("size", [1e-22, 1e-17, 1.0, 1e19, 1e30])
def test_sums_of_squares(size: float) -> None:
    weights = (BASE * size).astype(np.float32)
    expected = float(np.square(weights.astype(np.float64)).sum())
    assert sum_of_squares(weights) == pytest.approx(expected, rel=1e-5)
    assert sum_of_squares(weights * np.float32(0)) == 0


@pytest.mark.parametrize("size", [1e-30, 1e19])
@pytest.mark.parametrize("kind", [FeedbackQuantizer, GptqQuantizer])
def test_calibrated_rounding_names_what_it_cannot_square(kind: Any, size: float) -> None:
    source = ArraySource("w", (BASE * size).astype(np.float32))
    with pytest.raises(FormatError, match=rf"w: its largest weight is .*{'-30' if size < 1 else '19'}, beyond"):
        kind(0.2, np.eye(COLUMNS, dtype=np.float32)).quantize(source, lambda counts: pytest.fail("not reached"))


def test_a_step_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(FormatError, match="too small for free steps"):
        EcsqQuantizer(0.1).quantize(ArraySource("w", (BASE * 1e-38).astype(np.float32)), lambda counts: pytest.fail(""))
