"""`entrollm report` on the example model."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from entrollm import CompressOptions, compress
from entrollm.cli.main import app
from tests.support.paths import EXAMPLES

MODEL = str(EXAMPLES / "tiny-llama")
TEXT = ["--text", str(EXAMPLES / "wikitext-2-test.txt"), "--window", "32", "--max-windows", "2"]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "eight bits"
    compress(MODEL, path, CompressOptions(bits=8))
    return path


def run(*args: str):
    return CliRunner().invoke(app, ["report", *args], catch_exceptions=False)


def test_page_has_every_matrix_and_the_speed(compressed: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = run(str(compressed), "--against", MODEL, *TEXT, "--html", str(page))
    assert result.exit_code == 0
    html = page.read_text("utf-8")
    assert "model.layers.3.mlp.down_proj.weight" in html
    assert "method paper, bits 8" in html
    assert "tokens/s" in html
    assert "64 predictions" not in html
    assert "2 windows of 32 tokens, 62 predictions" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MODEL], "not a compressed model"),
        (["/no/such"], "/no/such"),
        (["OUT", "--html", "/no/such/a.html"], "there is no folder"),
    ],
)
def test_what_cannot_be_reported_is_named(compressed: Path, arguments: list[str], message: str) -> None:
    arguments = [str(compressed) if argument == "OUT" else argument for argument in arguments]
    result = run(*arguments, "--against", MODEL, *TEXT, "--no-speed")
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not Path("report.html").exists()
