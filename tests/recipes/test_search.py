"""The smallest file within a divergence."""

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from entrollm.compress import CodingOptions, size_range
from entrollm.engine.load import load
from entrollm.evaluate import Windows, evaluate
from entrollm.recipes.search import DivergenceLimit, compress_within, smallest_size
from tests.support.checkpoints import write_random_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One random layer."""
    return write_random_llama(tmp_path_factory.mktemp("model"), layers=1, tied=True)


@pytest.fixture(scope="module")
def windows() -> NDArray[np.int64]:
    return np.random.default_rng(6).integers(0, 512, (3, 64))


def test_the_divergence_is_kept_and_measured_on_what_is_written(
    model: Path, windows: NDArray[np.int64], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _, result = compress_within(model, out, CodingOptions(), DivergenceLimit(0.3, windows))
    evaluations, _ = evaluate([load(out)], Windows(windows, 1, 1), load(model))
    assert evaluations[0].divergence is not None
    assert evaluations[0].divergence.mean == pytest.approx(result.divergence.mean)
    assert 0.25 < result.divergence.mean <= 0.3
    assert result.predictions == 3 * 63
    assert result.to_json()["kl"]["mean"] == result.divergence.mean
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_every_size_is_fitted_before_it_is_measured(model: Path, windows: NDArray[np.int64], tmp_path: Path) -> None:
    fitted: list[Path] = []

    def post_fit(folder: Path) -> dict[str, NDArray[np.float32]]:
        fitted.append(folder)
        return {}

    _, result = compress_within(
        model, tmp_path / "out", CodingOptions(), DivergenceLimit(0.3, windows), post_fit=post_fit
    )
    assert len(fitted) == len(result.trials) + 1
    assert fitted[-1] == tmp_path / "out.partial"


def test_an_impossible_divergence_is_refused(model: Path, windows: NDArray[np.int64], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no size keeps the KL divergence at or below 1e-09: at \d+\.\d\d bits"):
        compress_within(model, tmp_path / "out", CodingOptions(), DivergenceLimit(1e-9, windows))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("max_kl", [0.0, -1.0, math.nan, math.inf])
def test_a_divergence_that_is_no_limit_is_refused(max_kl: float, windows: NDArray[np.int64]) -> None:
    with pytest.raises(ValueError, match="the KL divergence must be above 0"):
        DivergenceLimit(max_kl, windows)


def test_an_existing_output_is_refused_before_the_search(
    model: Path, windows: NDArray[np.int64], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a compressed model"):
        compress_within(model, tmp_path, CodingOptions(), DivergenceLimit(0.1, windows))


def test_the_stated_sizes_are_met(model: Path) -> None:
    smallest, largest = size_range(model, CodingOptions())
    assert 1 < smallest < 4 < largest < 12


@pytest.mark.parametrize("max_kl", [1e-5, 0.01, 0.3])
@pytest.mark.parametrize("slope", [0.7, 1.4, 2.5])
def test_the_search_finds_the_size_of_any_exponential(max_kl: float, slope: float) -> None:
    sizes: list[float] = []

    def attempt(bits: float) -> float:
        sizes.append(bits)
        return 3 * math.exp(-slope * bits)

    if 3 * math.exp(-slope * 11) > max_kl:
        with pytest.raises(ValueError, match="no size keeps"):
            smallest_size(attempt, (1.2, 11), max_kl)
        return
    found = smallest_size(attempt, (1.2, 11), max_kl)
    exact = math.log(3 / max_kl) / slope
    assert exact <= found <= max(exact, 1.2) + max(0.05 / slope, 0.02) + 0.01
    assert len(sizes) <= 8


def test_the_smallest_size_is_taken_where_it_is_enough() -> None:
    assert smallest_size(lambda bits: 0.001, (1.5, 9), 0.5) == 1.5


def test_a_divergence_that_hardly_falls_ends_at_the_largest_size() -> None:
    sizes: list[float] = []

    def attempt(bits: float) -> float:
        sizes.append(bits)
        return 0.02 * math.exp(-0.01 * bits)

    assert smallest_size(attempt, (1.5, 90), 0.009) == 90
    assert sizes[-1] == 90
    with pytest.raises(ValueError, match="no size keeps"):
        smallest_size(attempt, (1.5, 70), 0.009)
