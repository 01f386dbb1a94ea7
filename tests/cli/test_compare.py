"""`entrollm compare`: a table, JSON to draw again, and a plot."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from entrollm import CompressOptions, compress
from entrollm.cli.main import app
from tests.support.paths import EXAMPLES

MODEL = str(EXAMPLES / "tiny-llama")
TEXT = str(EXAMPLES / "wikitext-2-test.txt")
SHORT = ("--text", TEXT, "--window", "64", "--max-windows", "3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("compare")
    compress(MODEL, path / "paper-8", CompressOptions(bits=8))
    compress(MODEL, path / "ecsq-3", CompressOptions(bpw=3))
    return [str(path / "paper-8"), str(path / "ecsq-3")]


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["compare", *args], catch_exceptions=False)


def test_the_results_are_those_of_eval_with_sizes(folders: list[str]) -> None:
    result = run(MODEL, *folders, *SHORT, "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    evaluated = CliRunner().invoke(app, ["eval", *folders, *SHORT, "--against", MODEL, "--json"])
    expected = json.loads(evaluated.stdout)
    for ours in (found, expected):
        del ours["elapsed_s"]
    assert found == expected
    fine, coarse = found["models"]
    assert (fine["method"], coarse["method"], found["reference"]["method"]) == ("paper", "ecsq", None)
    for model, folder in zip(found["models"], folders, strict=True):
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        assert (model["file_bytes"], model["weights"]) == (size, found["reference"]["weights"])
        assert model["file_bits"] == size * 8 / model["weights"]
    assert coarse["file_bits"] == pytest.approx(3, rel=0.005) and found["reference"]["file_bits"] == pytest.approx(
        16, 0.01
    )
    assert 0 < fine["kl"]["mean"] < coarse["kl"]["mean"] < coarse["kl"]["percentile_99"]
    assert 0 < fine["kl"]["standard_error"] < fine["kl"]["mean"]
    assert 0 < coarse["kl"]["top1_agreement"] <= fine["kl"]["top1_agreement"] <= 1
    assert math.isfinite(coarse["perplexity"])


def test_people_get_a_table_and_files(folders: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    saved, plot = tmp_path / "results.json", tmp_path / "curve.png"
    result = run(MODEL, *folders, *SHORT, "--json", str(saved), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    for heading in ("file bits/weight", "± KL", "KL 99 %", "same top-1 (%)"):
        assert heading in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG") and sorted(p.name for p in tmp_path.iterdir()) == [
        "curve.png",
        "results.json",
    ]
    assert len(json.loads(saved.read_text())["models"]) == 2


def test_earlier_points_are_drawn_too(folders: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peers = {"models": [{"model": "Q4_K_M", "file_bits": 4.85, "kl": {"mean": 0.02}}]}
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    plot = tmp_path / "curve.svg"
    result = run(MODEL, folders[0], MODEL, *SHORT, "--plot", str(plot), "--add", str(tmp_path / "peers.json"))
    assert result.exit_code == 0, result.output
    picture = plot.read_text()
    # Text in an SVG is drawn, with the characters in comments.
    assert all(f"<!-- {label} -->" in picture for label in ("Q4_K_M", "peers", "paper-8", "paper"))
    assert "curve.svg has no place for a KL of 0: tiny-llama" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "peers.json: not valid JSON"),
        ("[]", 'expected an object with "models", a list'),
        ('{"models": [3]}', "peers: model 0 is no object"),
        ('{"models": [{"model": "a", "file_bits": 4}]}', 'needs "model", a name, and "kl"'),
        ('{"models": [{"model": "a", "file_bits": "4", "kl": {"mean": 1}}]}', "needs 'file_bits', a number"),
        ('{"models": [{"model": "a", "file_bits": 4, "kl": {"mean": NaN}}]}', "needs 'mean', a number"),
        ('{"models": [{"model": "a", "file_bits": 4, "kl": {"mean": 1, "standard_error": -1}}]}', "'standard_error'"),
    ],
)
def test_earlier_results_of_another_form_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "peers.json").write_text(content)
    result = run(MODEL, MODEL, *SHORT, "--plot", str(tmp_path / "a.png"), "--add", str(tmp_path / "peers.json"))
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add", "peers.json"], "--add goes with --plot FILE, which draws its figures"),
        (["--json", "/no/such.json"], "--json /no/such.json: there is no folder /no"),
        (["--plot", "/no/such.png"], "--plot /no/such.png: there is no folder /no"),
        (["--json", "/"], "--json / is not a file"),
    ],
)
def test_files_that_could_not_be_written_are_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    result = run(MODEL, "./nothing", *SHORT, *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_a_plot_of_another_type_is_refused_before_anything_runs() -> None:
    result = run(MODEL, "./nothing", *SHORT, "--plot", "curve.txt")
    assert result.exit_code == 1
    assert "curve.txt: name the plot *.png, *.svg, *.pdf" in result.stderr


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(MODEL, "./nothing", *SHORT, "--plot", "curve.png")
    assert result.exit_code == 1
    assert "pip install 'entrollm[plot]'" in result.stderr
