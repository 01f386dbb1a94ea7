"""Models in lm-eval, beside its own back end for transformers on the exported checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from entrollm import CompressOptions, compress
from entrollm.cli.main import app
from entrollm.compress.export import export
from entrollm.errors import FormatError
from entrollm.format.reader import CompressedModel
from entrollm.harness import HarnessModel
from entrollm.threads import start_pool
from tests.support.paths import EXAMPLES

TASKS = EXAMPLES / "tasks"
TEXT = (EXAMPLES / "wikitext-2-test.txt").read_text("utf-8")[1000:4000]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness") / "out"
    compress(EXAMPLES / "tiny-llama", path, CompressOptions(bits=8))
    return path


@pytest.fixture(scope="module")
def ours(compressed: Path) -> HarnessModel:
    return HarnessModel(str(compressed), max_length=128, batch_size=3)


@pytest.fixture(scope="module")
def theirs(compressed: Path) -> HFLM:
    exported = compressed.parent / "exported"
    with CompressedModel.open(compressed) as opened:
        export(opened, exported, start_pool(1), "f32")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    return HFLM(model, tokenizer=tokenizer, max_length=128, batch_size=1, device="cpu")


def instances(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_likelihoods_are_those_of_transformers(ours: HarnessModel, theirs: HFLM) -> None:
    sentences = [json.loads(line) for line in (TASKS / "facts.jsonl").read_text().splitlines()[:6]]
    pairs = [(each["question"], " " + choice) for each in sentences for choice in each["choices"]]
    pairs += [("", "The river"), ("ends with a space ", "of"), (TEXT, " and the"), (TEXT[:1500], TEXT[1500:1600])]
    requests = instances("loglikelihood", *pairs)
    found, wanted = ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], rel=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_order_and_company_of_requests_change_nothing(ours: HarnessModel) -> None:
    pairs = [(TEXT[:300], TEXT[300 : 320 + 9 * i]) for i in range(4)] + [(TEXT[:200], TEXT[200:260])]
    requests = instances("loglikelihood", *pairs)
    together = ours.loglikelihood(requests, disable_tqdm=True)
    assert together == [ours.loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    assert together[::-1] == ours.loglikelihood(requests[::-1], disable_tqdm=True)


def test_whole_texts_are_cut_into_the_same_windows(ours: HarnessModel, theirs: HFLM) -> None:
    requests = instances("loglikelihood_rolling", (TEXT,), (TEXT[:100],))
    found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-3)


def test_generated_texts_are_those_of_transformers(ours: HarnessModel, theirs: HFLM) -> None:
    options = {"until": ["."], "max_gen_toks": 16}
    prompts = [TEXT[:n] for n in (40, 200, 201, 700)] + ["Once upon a time"]
    requests = instances("generate_until", *((prompt, options) for prompt in prompts))
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_beams": 4}, "no beams"), ({"typical_p": 0.5}, "only"), ({"max_gen_toks": 128}, "from 1 to 127")],
)
def test_options_that_are_not_followed_are_refused(
    ours: HarnessModel, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours.generate_until(instances("generate_until", ("a", options)), disable_tqdm=True)


def run(*args: str):
    return CliRunner().invoke(app, ["eval", *args], catch_exceptions=False)


def test_command_scores_a_task(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)  # where the task's file names start
    result = run(str(compressed), "--tasks", "entrollm_facts", "--include", str(TASKS), "--limit", "8", "--json")
    assert result.exit_code == 0
    (model,) = json.loads(result.stdout)["models"]
    scores = {each["metric"]: each for each in model["scores"]}
    assert set(scores) == {"acc", "acc_norm"}
    assert scores["acc"]["samples"] == 8
    assert 0 <= scores["acc"]["value"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --text FILE or --tasks"),
        (["--tasks", "a", "--text", "b"], "either --text FILE or --tasks"),
        (["--tasks", ","], "names no task"),
        (["--tasks", "a", "--include", "/no/such"], "not a folder"),
        (["--tasks", "a", "--window", "8"], "--window cannot be given with --tasks"),
        (["--text", "a", "--limit", "8"], "--limit cannot be given with --text"),
    ],
)
def test_wrong_use_is_named(compressed: Path, arguments: list[str], message: str) -> None:
    result = run(str(compressed), *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_predictions_that_are_not_finite_are_an_error(ours: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval would count them as wrong, or as right."""
    logits = ours._model.logits
    monkeypatch.setattr(ours._model, "logits", lambda *args, **options: logits(*args, **options) * np.float32(np.nan))
    with pytest.raises(FormatError, match="the model's predictions are not finite"):
        ours.loglikelihood(instances("loglikelihood", ("The", " river")), disable_tqdm=True)
