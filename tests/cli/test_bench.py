"""`entrollm bench`: what it measures, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from entrollm import CompressOptions, compress
from entrollm.cli.main import app
from entrollm.engine.benchmark import measure_speeds
from entrollm.engine.code_speeds import measure_codes
from entrollm.engine.generate import GenerationResult
from entrollm.engine.model import Model
from entrollm.format.reader import CompressedModel
from entrollm.matrix import CodedMatrix, matrix_of
from tests.support.paths import TINY_LLAMA

FEW = ["--prompt-tokens", "12", "--tokens", "4", "--rounds", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "coded"
    compress(TINY_LLAMA, path, CompressOptions(bits=8, threads=2))
    return path


def test_every_choice_is_timed_in_every_round(folder: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(folder), "--json", *FEW])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["threads"] == 1 and [speed["memory"] for speed in facts["speeds"]] == ["file", "fast"]
    for speed in facts["speeds"]:
        assert speed["first_token_s"] > 0
        for rates in (speed["prompt_rates"], speed["token_rates"]):
            assert len(rates) == 2 and min(rates) > 0


def test_the_table_names_machine_and_choice(folder: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(folder), "--memory", "auto", *FEW])
    assert result.exit_code == 0, result.stderr
    assert ", 1 thread " in result.stdout
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("│")] == ["auto"]


def test_rates_are_of_the_tokens_that_were_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    generate = Model.generate

    def count(self: Model, prompt: object, **options: object) -> GenerationResult:
        result = generate(self, prompt, **options)  # type: ignore[arg-type]
        made.append(len(result.token_ids))
        return replace(result, prefill_s=3.0, decode_s=8.0)

    monkeypatch.setattr(Model, "generate", count)
    (speed,) = measure_speeds(folder, ["file"], 1, prompt=6, tokens=5, rounds=1)
    assert made == [1, 1, 5]
    assert speed.prompt_rates == (6 / 3,) and speed.token_rates == (4 / 8,)


def test_the_papers_codes_are_timed_beside_the_model(folder: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(folder), "--codes", "--json", "--rounds", "1", "--threads", "2"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["threads"] == [1, 2] and facts["weights_per_token"] > 0
    codes = {speed["code"]: speed for speed in facts["codes"]}
    assert list(codes)[:4] == ["uint8", "uint8, Huffman", "uint4", "uint4, Huffman"] and len(codes) == 6
    assert all(len(speed["rates"]) == 2 and min(speed["rates"]) > 0 for speed in codes.values())
    assert 8 <= codes["uint8"]["bits"] < 9 and 4 <= codes["uint4"]["bits"] < 5
    assert codes["uint4, Huffman"]["bits"] < codes["uint4"]["bits"]
    assert codes["uint8, Huffman"]["bits"] < codes["uint8"]["bits"]


def test_the_table_of_codes_has_ratios_over_uint8(folder: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(folder), "--codes", "--rounds", "1", "--threads", "1"])
    assert result.exit_code == 0, result.stderr
    rows = [line.split("│")[1:-1] for line in result.stdout.splitlines() if line.startswith("│")]
    assert [cell.strip() for cell in (rows[0][0], rows[0][3])] == ["uint8", "1.00"]
    assert rows[-1][0].strip() == "this model, flat in memory"


def test_evenly_spaced_matrices_stand_for_a_large_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def open_matrix(model: CompressedModel, name: str) -> CodedMatrix:
        opened.append(name)
        return matrix_of(model, name)

    monkeypatch.setattr("entrollm.engine.code_speeds.matrix_of", open_matrix)
    sizes = {name: spec.rows * spec.columns for name, spec in CompressedModel.open(folder).specs.items()}
    largest = max(sizes.values())
    for most, expected in ((sum(sizes.values()) // 3, 5), (largest - 1, 5), (1, 1)):
        opened.clear()
        speeds = measure_codes(folder, [1], rounds=1, most_weights=most)
        assert len(opened) >= expected and all(speed.rates[0] > 0 for speed in speeds)
        assert sum(sizes[name] for name in opened) <= max(most, min(sizes.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "slow"], "memory should be one of auto, file, fast, found 'slow'"),
        (["--tokens", "1"], "--tokens"),
        (["--prompt-tokens", "100000"], "context"),
        (["--codes", "--memory", "fast", "--tokens", "9"], "--memory, --tokens cannot be given with --codes"),
    ],
)
def test_what_cannot_be_timed_is_refused(folder: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", str(folder), *arguments])
    assert result.exit_code != 0
    assert message in result.stderr
