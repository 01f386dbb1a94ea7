"""What is said of a model that stayed close to its original, and of one that did not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import entrollm
from entrollm import CompressOptions, CompressResult
from entrollm.cli.flags import write_flags
from entrollm.cli.main import app
from entrollm.compress.result import MatrixError
from entrollm.evaluate.closeness import Closeness
from entrollm.recipes.closeness import damage_of_plan, damage_of_result
from tests.support.checkpoints import write_checkpoint, write_random_llama
from tests.support.paths import TINY_LLAMA


def invoke(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> CompressResult:
    """The example, compressed without options."""
    return entrollm.compress(TINY_LLAMA, tmp_path_factory.mktemp("default") / "out")


def test_the_default_stays_close(default: CompressResult) -> None:
    assert default.file_bits == pytest.approx(4.5, rel=0.005)
    assert default.closeness is not None and default.unmeasured is None
    assert default.closeness.kl < 0.05 and default.closeness.top1_agreement > 0.85
    assert default.closeness.perplexity < 1.05 * default.closeness.original_perplexity
    assert damage_of_result(default, CompressOptions()) is None
    assert default.to_json()["closeness"] == default.closeness.to_json()


def test_a_result_that_is_far_is_named_with_the_better_command(tmp_path: Path) -> None:
    result = invoke("compress", TINY_LLAMA, "-o", tmp_path / "out", "--bits", 4)
    assert "KL divergence from the original: 0.9" in words(result.stdout)
    assert "on 255 predictions of a short text" in words(result.stdout)
    assert "warning: the model is far from its original: a KL divergence of 0.9" in words(result.stderr)
    assert "use --bpw 4.5 in place of --bits" in words(result.stderr)


def test_json_has_the_figures_and_they_can_be_turned_off(tmp_path: Path) -> None:
    arguments = ("compress", TINY_LLAMA, "--bits", 4, "--json")
    measured = json.loads(invoke(*arguments, "-o", tmp_path / "measured").stdout)
    assert set(measured["closeness"]) == {
        *("kl", "top1_agreement", "perplexity", "original_perplexity", "predictions", "elapsed_s")
    }
    result = invoke(*arguments, "-o", tmp_path / "out", "--no-measure")
    unmeasured = json.loads(result.stdout)
    assert (unmeasured["closeness"], unmeasured["unmeasured"]) == (None, None)
    assert unmeasured["relative_error"] == measured["relative_error"] > 0.25
    assert unmeasured["worst"]["relative_error"] > 0.5
    # Judged by its error instead.
    assert "relative error of 0.30" in words(result.stderr)
    assert f"the largest 0.627 in {unmeasured['worst']['name']}" in words(result.stderr)


def test_what_cannot_be_measured_is_said_and_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = write_random_llama(tmp_path / "model", layers=1, tied=True)
    result = invoke("compress", model, "-o", tmp_path / "out")
    assert "how close the model stayed to its original was not measured: this model has no tokenizer.json" in words(
        result.stderr
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()
    # Where the engine's refusal was named before, it is not repeated.
    other = write_checkpoint(tmp_path / "other")
    result = invoke("compress", other, "-o", tmp_path / "also")
    assert "entrollm run will not load the result" in words(result.stderr)
    assert "was not measured" not in words(result.stderr)
    assert entrollm.compress(other, tmp_path / "python").unmeasured is not None


def test_a_plan_has_the_default_size_and_warns_of_a_coarse_one() -> None:
    assert json.loads(invoke("plan", TINY_LLAMA, "--json").stdout)["file_bits"] == pytest.approx(4.5, rel=0.005)
    assert not invoke("plan", TINY_LLAMA).stderr
    result = invoke("plan", TINY_LLAMA, "--bpw", 2.5)
    assert "expect a KL divergence of 0.45 to 1.9 nats or more" in words(result.stderr)
    assert "use --bpw 5.0, or add --calibration self" in words(result.stderr)


FAR = Closeness(0.5, 0.6, 40.0, 30.0, 255, 1.0)


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"closeness": FAR}, {"bpw": 3.0}, "at 60 %; use --bpw 4.5, or add --calibration self"),
        ({"closeness": FAR}, {"bpw": 3.0, "calibration": "self"}, "at 60 %; use --bpw 4.5"),
        ({"closeness": replace(FAR, kl=4.0)}, {"bpw": 3.0}, "use --bpw 6.0, or"),
        ({"closeness": FAR}, {"bits": 8}, "use --bpw 6.0 in place of --bits"),
        ({"closeness": FAR}, {"overrides": {"*": 3}}, "use --bpw 4.5 in place of --bits"),
        ({"closeness": replace(FAR, kl=0.2), "relative_error": 0.3}, {"bpw": 3.0}, None),
        ({"relative_error": 0.2}, {"bpw": 3.0}, "expect a KL divergence of 0.34 to 1.4 nats"),
        ({"relative_error": 0.2}, {"bpw": 3.0, "calibration": "self"}, None),
        ({"relative_error": 0.12}, {"bpw": 3.0}, None),
        ({"worst": MatrixError("q", 0.5)}, {"bpw": 3.0}, "the largest 0.500 in q"),
        ({"relative_error": 0.0, "worst": None}, {}, None),
    ],
)
def test_when_a_result_is_far(
    default: CompressResult, changes: dict[str, Any], options: dict[str, Any], expected: str | None
) -> None:
    changed = replace(default, **{"closeness": None, "file_bits": 3.0, **changes})
    found = damage_of_result(changed, CompressOptions(**options))
    if expected is None:
        assert found is None
    else:
        assert found is not None and expected in found.write(write_flags)


def test_python_gets_the_same_words() -> None:
    options = CompressOptions(bpw=2.0)
    found = damage_of_plan(entrollm.plan(TINY_LLAMA, options), options)
    assert found is not None and str(found).endswith(", or add calibration='self'")
