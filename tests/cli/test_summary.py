"""What `compress`, `verify` and `export` print: folders whose names look like markup, and results without matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from entrollm.cli.main import app
from tests.support.checkpoints import write_random_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("names"), 1, True)


def say(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stdout.split())


@pytest.mark.parametrize("name", ["of [draft]", "end [", "[/bold]"])
def test_folders_with_brackets(name: str, model: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / name / "out", tmp_path / name / "copy"
    assert f"{out}: " in say("compress", model, "-o", out, "--no-measure")
    assert f"ok {out}: " in say("verify", out)
    assert f"{copy}: " in say("export", out, "-o", copy)
    assert str(out) in say("inspect", out)


def test_a_result_without_coded_matrices_is_said(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no matrix is coded: all tensors keep their types" in say("compress", model, "-o", out, "--lossless")
    assert "in the file 0.000 bits" in say("inspect", out)


def test_a_refused_size_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compress", str(model), "-o", str(tmp_path / "out"), "--fit", "1KB"])
    assert result.exit_code == 1 and "this model cannot take 1000 bytes" in result.stderr
    assert not list(tmp_path.iterdir())
