"""`entrollm info`: the installation, and what a folder takes in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from entrollm import CompressOptions, compress
from entrollm.cli.main import app
from tests.support.paths import TINY_LLAMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("info") / "coded"
    compress(TINY_LLAMA, path, CompressOptions(bits=4, threads=2))
    return path


def test_a_folder_is_described_by_form(folder: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(folder), "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert set(facts["memory"]) == {"file", "fast", "auto"}
    assert facts["memory"]["file"]["own_bytes"] == 0 and facts["memory"]["fast"]["file_bytes"] == 0
    for matrix in facts["matrices"]:
        assert matrix["auto"] in ("flat", "file")
        assert matrix["flat_bytes"] > 0 and sum(matrix["flat_rows"].values()) > 0
    assert facts["memory"]["fast"]["own_bytes"] == sum(matrix["flat_bytes"] for matrix in facts["matrices"])


def test_the_table_tells_the_choices(folder: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(folder)])
    assert result.exit_code == 0, result.stderr
    for choice in ("file", "fast", "auto"):
        assert f"--memory {choice}" in result.stdout
    assert "matrices flat; instruction set" in result.stdout


def test_an_unknown_choice_of_memory_is_refused(folder: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(folder), "-p", "Once", "--max-tokens", "1", "--memory", "slow"])
    assert result.exit_code != 0
    assert "memory should be one of auto, file, fast, found 'slow'" in result.stderr


@pytest.mark.parametrize("choice", ["auto", "file", "fast"])
def test_every_choice_writes_the_same_text(folder: Path, choice: str) -> None:
    arguments = ["run", str(folder), "-p", "Once upon", "--max-tokens", "8", "--json", "--memory"]
    result = CliRunner().invoke(app, [*arguments, choice])
    assert result.exit_code == 0, result.stderr
    expected = CliRunner().invoke(app, [*arguments, "file"])
    assert json.loads(result.stdout)["token_ids"] == json.loads(expected.stdout)["token_ids"]
