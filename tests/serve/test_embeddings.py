"""Vectors of texts, and prompts that are read without an answer."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from entrollm import Model
from entrollm.engine.batch import SequenceStep
from entrollm.engine.weights import Floats
from tests.serve.running import Running
from tests.serve.test_completions import complete, events
from tests.serve.test_refusals import refused

PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def model(server: Running) -> Model:
    return server.models[0].model


def hidden_of(model: Model, text: str) -> Floats:
    found: list[Floats] = []
    ids = np.array(model.encode(text))
    model.step([SequenceStep(ids, model.new_cache(), False, lambda _, hidden: found.append(hidden))])
    return np.concatenate(found)


def unit(vector: Floats) -> Floats:
    return vector / np.linalg.norm(vector)


def vectors(client: httpx.Client, **body: Any) -> list[Any]:
    response = client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert [each["index"] for each in answer["data"]] == list(range(len(answer["data"])))
    return [each["embedding"] for each in answer["data"]]


def test_mean_and_last(client: httpx.Client, model: Model) -> None:
    hidden = hidden_of(model, "The king was old")
    (mean,) = vectors(client, input="The king was old")
    np.testing.assert_allclose(mean, unit(hidden.mean(axis=0)), atol=1e-5)
    (last,) = vectors(client, input="The king was old", pooling="last")
    np.testing.assert_allclose(last, unit(hidden[-1]), atol=1e-5)
    (short,) = vectors(client, input=[model.encode("The king was old")], dimensions=3)
    np.testing.assert_allclose(short, unit(hidden.mean(axis=0)[:3]), atol=1e-5)
    (packed,) = vectors(client, input="The king was old", encoding_format="base64", dimensions=3)
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), short, atol=1e-6)


def test_many_texts_of_the_client(server: Running, model: Model) -> None:
    texts = [
        f"The {word} was old"
        for word in ["king", "queen", "fool", "ship", "sword", "crown", "night", "forest", "storm", "ghost"]
    ]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="tiny", input=texts)
    for text, each in zip(texts, answer.data, strict=True):
        np.testing.assert_allclose(each.embedding, unit(hidden_of(model, text).mean(axis=0)), atol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(model.encode(text)) for text in texts)


def test_a_text_in_pieces_beside_a_stream(server: Running, client: httpx.Client, model: Model) -> None:
    """Long texts are read in pieces while another answer runs, and leave no trace in the slots."""
    complete(client, prompt="Once upon a time there was a king", max_tokens=1)
    long = "The king was old and the queen was young. " * 20
    with client.stream("POST", "/v1/completions", json={"prompt": "Who", "max_tokens": 60, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        with httpx.Client(base_url=server.url, timeout=60) as other:
            found = vectors(other, input=[long] * 5)
    for vector in found:
        np.testing.assert_allclose(vector, unit(hidden_of(model, long).mean(axis=0)), atol=1e-4)
    again = complete(client, prompt="Once upon a time there was a king", max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 4
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "should hold 1 to 2048 prompts"),
        ({"input": ["x"] * 2049}, "should hold 1 to 2048 prompts"),
        ({"input": ["x", 5]}, "should be a text, token ids, or a list of either"),
        ({"input": [[2**40]]}, "should be a text, token ids"),
        ({"input": [99999]}, "token id 99999 is outside the vocabulary"),
        ({"input": "word " * 600}, "leaves no room for an answer in a context of 512"),
        ({"input": "x", "dimensions": 99999}, "dimensions should be at most"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format: Input should be 'float' or 'base64'"),
    ],
)
def test_bad_requests(client: httpx.Client, body: dict[str, Any], message: str) -> None:
    assert message in refused(client.post(PATH, json=body), 400)["message"]


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


@pytest.mark.parametrize("most", [0, 3])
def test_echo_with_logprobs(client: httpx.Client, model: Model, most: int) -> None:
    answer = complete(client, prompt="The king was old", echo=True, logprobs=2, max_tokens=most, n=2)
    ids = model.encode("The king was old")
    ids += list(model.generate("The king was old", max_tokens=most).token_ids) if most else []
    expected = log_softmax(model.logits(ids[:-1]))
    for choice in answer["choices"]:
        logged = choice["logprobs"]
        assert choice["text"] == "".join(logged["tokens"])
        assert choice["text"].startswith("The king was old")
        assert choice["finish_reason"] == "length"
        assert logged["token_logprobs"][0] is logged["top_logprobs"][0] is None
        for row, token, logprob, top in zip(
            expected, ids[1:], logged["token_logprobs"][1:], logged["top_logprobs"][1:], strict=True
        ):
            assert logprob == pytest.approx(float(row[token]), abs=2e-3)
            assert len(top) == 2
            assert max(top.values()) == pytest.approx(float(row.max()), abs=2e-3)
        assert [choice["text"][at : at + 3] for at in logged["text_offset"][:3]] == ["The", " ki", " wa"]
    assert answer["usage"]["completion_tokens"] == 2 * most


def test_echo_alone_and_in_a_stream(client: httpx.Client, model: Model) -> None:
    whole = complete(client, prompt=model.encode("The king was"), echo=True, max_tokens=4)["choices"][0]["text"]
    assert whole == "The king was" + model.generate("The king was", max_tokens=4).text
    pieces = events(client, "/v1/completions", prompt="The king was", echo=True, max_tokens=4)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole
    pieces = events(client, "/v1/completions", prompt="The king was", echo=True, max_tokens=0)
    assert [piece["choices"][0]["text"] for piece in pieces] == ["The king was", ""]
    error = refused(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 0}), 400)
    assert "max_tokens should be at least 1 without echo" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "what"),
    [
        (PATH, {"input": "The king"}, "hidden states"),
        (PATH, {"input": "The king", "encoding_format": "base64", "pooling": "last"}, "hidden states"),
        ("/v1/completions", {"prompt": "The king", "echo": True, "logprobs": 1, "max_tokens": 0}, "logits"),
    ],
)
def test_numbers_that_are_not_finite_are_an_error(
    path: str, body: Any, what: str, client: httpx.Client, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be vectors of NaN, or null in place of log-probabilities."""
    run = model.step

    def step(steps: list[SequenceStep]) -> Floats:
        def broken(observe: Any) -> Any:
            return None if observe is None else lambda start, hidden: observe(start, hidden * np.float32(np.nan))

        return run([replace(each, observe=broken(each.observe)) for each in steps])

    monkeypatch.setattr(model, "step", step)
    error = refused(client.post(path, json=body), 500)
    assert error["message"].startswith(f"the model's {what} are not finite: its weights hold NaN")
    assert error["code"] == "model_failed"
