"""Servers with --cache-type, --speculate and --draft: the same answers, fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from entrollm import Model, load
from entrollm.cli.main import app
from entrollm.engine.model import Speculate
from entrollm.engine.speculate import Speculation
from entrollm.serve.engines import CpuEngine
from entrollm.serve.grammar import GrammarError
from entrollm.serve.server import LoadOptions
from tests.serve.conftest import Serve
from tests.serve.running import Running
from tests.serve.test_completions import complete, events
from tests.serve.test_life import counter
from tests.serve.test_refusals import refused

TEXT = "/v1/completions"
PROMPT = "a b c d e f g a b c d e f g a b c"


class Eager:
    """A pace that guesses whenever there is room, so that tests do not depend on the clock."""

    def __init__(self, is_free: bool) -> None:
        pass

    def choose(self, kind: int, most: int) -> int:
        return min(most, 3)

    def record(self, *values: object) -> None:
        pass

    record_late = record_unused = record


@pytest.fixture(scope="module")
def plain(folder: Path) -> Model:
    return load(folder, threads=2)


@pytest.fixture(scope="module", params=["ngram", "draft"])
def guessing(serve: Serve, plain: Model, request: pytest.FixtureRequest) -> Iterator[Running]:
    speculate: Speculate = "ngram" if request.param == "ngram" else plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entrollm.engine.speculate.Pace", Eager)
        running = serve(LoadOptions(slots=3, engine=CpuEngine(threads=2, speculate=speculate)))
        yield running
        running.stop()


@pytest.fixture
def client(guessing: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guessing.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4, "frequency_penalty": 0.3}])
def test_the_text_is_that_without_guesses(
    guessing: Running, client: httpx.Client, plain: Model, options: dict[str, Any]
) -> None:
    before = [counter(guessing, f"{name}_total") for name in ("steps", "generated_tokens", "right_tokens")]
    answer = complete(client, prompt=PROMPT, max_tokens=40, **options)
    expected = plain.generate(PROMPT, max_tokens=40, **options)
    assert answer["choices"][0]["text"] == expected.text
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)
    after = [counter(guessing, f"{name}_total") for name in ("steps", "generated_tokens", "right_tokens")]
    steps, made, right = (now - then for now, then in zip(after, before, strict=True))
    assert right > 0 or options  # a sampled text repeats itself rarely
    assert (made, steps) == (len(expected.token_ids), len(expected.token_ids) - right)


def test_streams_have_each_token_and_end_where_they_should(client: httpx.Client, plain: Model) -> None:
    expected = plain.generate(PROMPT, max_tokens=40, stop=["an"])
    found = events(client, TEXT, prompt=PROMPT, max_tokens=40, stop="an")
    assert "".join(event["choices"][0]["text"] for event in found) == expected.text
    assert found[-1]["choices"][0]["finish_reason"] == expected.finish_reason


def test_answers_beside_each_other(guessing: Running, client: httpx.Client, plain: Model) -> None:
    """An answer is alone, has company, and is alone again."""
    lengths = (90, 20, 10, 60)
    prompts = [f"{PROMPT} {number}" for number in range(len(lengths))]
    with ThreadPoolExecutor(len(lengths)) as pool:
        asked = zip(prompts, lengths, strict=True)
        waiting = [pool.submit(complete, client, prompt=prompt, max_tokens=tokens) for prompt, tokens in asked]
        texts = [each.result()["choices"][0]["text"] for each in waiting]
    pairs = zip(prompts, lengths, strict=True)
    assert texts == [plain.generate(prompt, max_tokens=tokens).text for prompt, tokens in pairs]
    assert (
        complete(client, prompt=PROMPT, max_tokens=9)["choices"][0]["text"] == plain.generate(PROMPT, max_tokens=9).text
    )


def test_log_probabilities_are_reported_for_each_token(client: httpx.Client) -> None:
    (choice,) = complete(client, prompt=PROMPT, max_tokens=12, logprobs=1)["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == 12


def test_a_grammar_holds(client: httpx.Client) -> None:
    (choice,) = complete(client, prompt="x", guided_regex="(ab|cd){9}", max_tokens=40)["choices"]
    text = choice["text"]
    assert len(text) == 18
    assert {text[i : i + 2] for i in range(0, 18, 2)} <= {"ab", "cd"}


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [(RuntimeError("damaged"), 500, "the model failed: damaged"), (GrammarError("no way on"), 400, "no way on")],
)
def test_a_failure_ends_its_answer_alone(
    guessing: Running,
    client: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    message: str,
) -> None:
    before = complete(client, prompt=PROMPT, max_tokens=9)["choices"]

    def fail(self: Speculation, text: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Speculation, "step", fail)
        assert refused(client.post(TEXT, json={"prompt": PROMPT}), status)["message"] == message
    assert complete(client, prompt=PROMPT, max_tokens=9)["choices"] == before
    assert guessing.service.scheduler.is_idle


def test_the_type_of_the_cache(serve: Serve, folder: Path) -> None:
    running = serve(LoadOptions(slots=2, engine=CpuEngine(threads=2, cache_type="int8")))
    assert {slot.cache.cache_type for slot in running.models[0].slots._slots} == {"int8"}  # type: ignore[attr-defined]
    expected = load(folder, threads=2, cache_type="int8").generate(PROMPT, max_tokens=20)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        assert complete(client, prompt=PROMPT, max_tokens=20)["choices"][0]["text"] == expected.text
    running.stop()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache-type", "int4"], "the cache's type should be one of f32, f16, int8, found 'int4'"),
        (["--speculate", "lookup"], "--speculate takes ngram or mtp, found 'lookup'"),
        (["--speculate", "mtp"], "--speculate mtp is an option of run"),
        (["--speculate", "ngram", "--draft", "x"], "are two ways to guess tokens; give one of them"),
        (["--engine", "transformers", "--cache-type", "f16"], "--cache-type is an option of entrollm's own engine"),
        (["--engine", "transformers", "--speculate", "ngram"], "--speculate is an option of entrollm's own engine"),
        (["--engine", "transformers", "--draft", "x"], "--draft is an option of entrollm's own engine"),
        (["--engine", "transformers", "--threads", "1"], "--threads is an option of entrollm's own engine"),
        (["--device", "cuda", "--memory", "file"], "--memory is an option of entrollm's own engine"),
    ],
)
def test_options_that_are_refused(folder: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["serve", str(folder), *arguments])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_a_draft_model_of_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        if file.name != "tokenizer.json":
            (other / file.name).symlink_to(file)
    result = CliRunner().invoke(app, ["serve", str(folder), "--draft", str(other)])
    assert result.exit_code == 1
    assert "the draft model has no tokenizer.json" in " ".join(result.stderr.split())
