"""/v1/completions and the endpoints around it, over HTTP."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from entrollm import Model
from tests.serve.running import Running


@pytest.fixture(scope="module")
def model(server: Running) -> Model:
    return server.models[0].model


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    with client.stream("POST", path, json={"model": "tiny", "stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_the_text_is_that_of_generate(client: httpx.Client, model: Model) -> None:
    answer = complete(client, prompt="The king", max_tokens=20)
    expected = model.generate("The king", max_tokens=20)
    assert answer["choices"] == [{"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length"}]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 20, 22)
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")


def test_sampling_options_reach_the_engine(client: httpx.Client, model: Model) -> None:
    options = {
        "temperature": 1.1,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "seed": 5,
    }
    for changed in ({}, {"seed": 6}, {"presence_penalty": 2.0}, {"top_k": 1}, {"temperature": 0.5}):
        used = options | changed
        expected = model.generate("The king", max_tokens=24, **used).text
        assert complete(client, prompt="The king", max_tokens=24, **used)["choices"][0]["text"] == expected
    first = model.encode("The king") + list(model.generate("The king", max_tokens=1).token_ids)
    biased = complete(client, prompt="The king", max_tokens=1, logit_bias={str(first[-1]): -100})
    assert biased["choices"][0]["text"] == model.generate("The king", max_tokens=1, logit_bias={first[-1]: -100}).text
    assert biased["choices"][0]["text"] != model.generate("The king", max_tokens=1).text


def test_default_length(client: httpx.Client) -> None:
    assert complete(client, prompt="The king")["usage"]["completion_tokens"] == 16


def test_a_stream_adds_up_to_the_text(client: httpx.Client, model: Model) -> None:
    found = events(client, "/v1/completions", prompt="The king", max_tokens=24, stream_options={"include_usage": True})
    *pieces, usage = found
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == model.generate("The king", max_tokens=24).text
    assert len(pieces) > 10
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 24
    assert len({piece["id"] for piece in found}) == 1
    assert all("usage" not in piece for piece in pieces)


def test_stop_strings(client: httpx.Client, model: Model) -> None:
    whole = model.generate("The king", max_tokens=24).text
    stop = whole[9:13]
    for answer in (
        complete(client, prompt="The king", max_tokens=24, stop=stop)["choices"][0],
        complete(client, prompt="The king", max_tokens=24, stop=["never", stop])["choices"][0],
    ):
        assert answer["text"] == whole[: whole.index(stop)]
        assert answer["finish_reason"] == "stop"
    pieces = events(client, "/v1/completions", prompt="The king", max_tokens=24, stop=stop)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == whole[: whole.index(stop)]


def test_several_prompts_and_choices(client: httpx.Client, model: Model) -> None:
    prompts = ["The king", "It rained"]
    answer = complete(client, prompt=prompts, n=3, temperature=1.0, seed=10, max_tokens=12)
    texts = [choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
    expected = [
        model.generate(prompt, max_tokens=12, temperature=1.0, seed=10 + choice).text
        for prompt in prompts
        for choice in range(3)
    ]
    assert texts == expected
    assert len(set(texts)) == 6
    assert answer["usage"]["completion_tokens"] == 72
    assert answer["usage"]["prompt_tokens"] == sum(len(model.encode(prompt)) for prompt in prompts)
    pieces = events(client, "/v1/completions", prompt=prompts, n=3, temperature=1.0, seed=10, max_tokens=12)
    for index, text in enumerate(expected):
        parts = [piece["choices"][0]["text"] for piece in pieces if piece["choices"][0]["index"] == index]
        assert "".join(parts) == text


def test_prompts_of_token_ids(client: httpx.Client, model: Model) -> None:
    ids = model.encode("The king of France")
    expected = model.generate("The king of France", max_tokens=8).text
    assert complete(client, prompt=ids, max_tokens=8)["choices"][0]["text"] == expected
    assert complete(client, prompt=[ids, ids[:2]], max_tokens=8)["choices"][0]["text"] == expected


def test_logprobs(client: httpx.Client, model: Model) -> None:
    answer = complete(client, prompt="The king", max_tokens=6, logprobs=3)["choices"][0]
    logprobs = answer["logprobs"]
    result = model.generate("The king", max_tokens=6)
    logits = model.logits([*model.encode("The king"), *result.token_ids]).astype(np.float64)[1:-1]
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs["token_logprobs"], expected[np.arange(6), list(result.token_ids)], atol=1e-3)
    for row, top in zip(expected, logprobs["top_logprobs"], strict=True):
        np.testing.assert_allclose(list(top.values()), np.sort(row)[::-1][:3], atol=1e-3)
    assert "".join(logprobs["tokens"]) == answer["text"]
    assert [
        answer["text"][offset:][: len(token)]
        for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
    ] == logprobs["tokens"]
    pieces = events(client, "/v1/completions", prompt="The king", max_tokens=6, logprobs=3)
    streamed = [piece["choices"][0]["logprobs"] for piece in pieces if piece["choices"][0]["logprobs"]]
    assert [token for part in streamed for token in part["tokens"]] == logprobs["tokens"]
    assert [offset for part in streamed for offset in part["text_offset"]] == logprobs["text_offset"]


def test_concurrent_requests_get_their_own_answers(client: httpx.Client, model: Model) -> None:
    prompts = [f"In the year {1700 + 7 * number} the" for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        texts = list(
            pool.map(
                lambda prompt: complete(client, prompt=prompt, max_tokens=20, temperature=0.8, seed=3)["choices"][0],
                prompts,
            )
        )
    for prompt, choice in zip(prompts, texts, strict=True):
        assert choice["text"] == model.generate(prompt, max_tokens=20, temperature=0.8, seed=3).text


def test_prompts_that_begin_alike_are_not_read_again(client: httpx.Client) -> None:
    prompt = "A long beginning, which several requests share, is read once. " * 5
    first = complete(client, prompt=prompt + "Then it", max_tokens=4)
    again = complete(client, prompt=prompt + "But he", max_tokens=4)
    tokens = again["usage"]["prompt_tokens"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= tokens - 5
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 5


def test_the_context_ends_an_answer(client: httpx.Client, model: Model) -> None:
    ids = (model.encode("word " * 600))[: model.config.context_length - 4]
    answer = complete(client, prompt=ids, max_tokens=100)
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


def test_tokenize_and_detokenize(client: httpx.Client, model: Model) -> None:
    found = client.post("/tokenize", json={"prompt": "The king of Köln"}).json()
    assert found == {"tokens": model.encode("The king of Köln"), "count": len(found["tokens"]), "max_model_len": 512}
    back = client.post("/detokenize", json={"model": "tiny", "tokens": found["tokens"]}).json()
    assert back == {"prompt": "The king of Köln"}


def test_models_and_health(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json() == listed["data"][0]
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_metrics_count(client: httpx.Client) -> None:
    def read() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = read()
    complete(client, prompt="The king of metrics", max_tokens=7)
    client.post("/v1/completions", json={"prompt": 3})
    client.get("/a/path/that/is/not/served")
    for name in ("a", "b", "%22%0A%5C"):
        assert client.post(f"/v1/models/{name}").status_code == 405
    after = read()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("entrollm_generated_tokens_total") == 7
    assert grown('entrollm_requests_total{path="/v1/completions",status="200"}') == 1
    assert grown('entrollm_requests_total{path="/v1/completions",status="400"}') == 1
    assert grown('entrollm_requests_total{path="other",status="404"}') == 1
    assert grown('entrollm_requests_total{path="/v1/models/{name}",status="405"}') == 3
    assert grown("entrollm_first_token_seconds_count") == 1
    assert grown('entrollm_first_token_seconds_bucket{le="+Inf"}') == 1
    assert grown("entrollm_prompt_tokens_total") > grown("entrollm_reused_prompt_tokens_total")
    assert after["entrollm_running"] == 0


def test_the_description_of_the_api(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].removeprefix("#/components/schemas/")
    assert "prompt" in schema["components"]["schemas"][name]["required"]
    assert client.get("/docs").status_code == 404  # it would load scripts from elsewhere
