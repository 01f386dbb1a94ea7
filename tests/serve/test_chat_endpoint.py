"""/v1/chat/completions, with OpenAI's own client and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from entrollm import Model
from tests.serve.running import Running
from tests.serve.test_completions import events

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was the king?"}]


@pytest.fixture(scope="module")
def model(server: Running) -> Model:
    return server.models[0].model


@pytest.fixture
def openai_client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer(openai_client: openai.OpenAI, model: Model) -> None:
    answer = openai_client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=20)
    expected = model.chat(MESSAGES, max_tokens=20)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens == len(model.encode_chat(MESSAGES))
    assert answer.usage.completion_tokens == 20


def test_a_stream(openai_client: openai.OpenAI, model: Model) -> None:
    stream = openai_client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=20,
        temperature=0.9,
        seed=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, usage = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == model.chat(MESSAGES, max_tokens=20, temperature=0.9, seed=4).text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 20


def test_choices_and_logprobs(openai_client: openai.OpenAI, model: Model) -> None:
    answer = openai_client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, n=2, temperature=1, seed=1, logprobs=True, top_logprobs=2
    )
    for choice in answer.choices:
        expected = model.chat(MESSAGES, max_tokens=8, temperature=1.0, seed=1 + choice.index)
        assert choice.message.content == expected.text
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 8
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 2
            assert token.logprob <= token.top_logprobs[0].logprob <= 0
            assert token.bytes is not None
            assert bytes(token.bytes).decode() == token.token
    assert answer.choices[0].message.content != answer.choices[1].message.content


def test_the_answer_may_fill_the_context(openai_client: openai.OpenAI, model: Model) -> None:
    prompt = len(model.encode_chat(MESSAGES))
    answer = openai_client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.usage is not None
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == model.config.context_length - prompt > 256


def test_parts_roles_and_template_variables(client: httpx.Client, model: Model) -> None:
    body: dict[str, Any] = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Who was"}, {"type": "text", "text": "the king?"}]},
            {"role": "assistant", "content": None, "refusal": None, "annotations": []},
            {"role": "user", "content": "Well?"},
        ],
        "chat_template_kwargs": {"mood": "gay"},
        "max_tokens": 6,
    }
    answer = client.post("/v1/chat/completions", json=body).json()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who was\nthe king?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Well?"},
    ]
    ids = model.encode_chat(messages, mood="gay")
    assert answer["usage"]["prompt_tokens"] == len(ids)
    text = "".join(model.stream(ids, max_tokens=6))
    assert answer["choices"][0]["message"]["content"].strip() == text.strip()


def test_a_dialogue_reuses_its_beginning(client: httpx.Client, model: Model) -> None:
    messages = [*MESSAGES, {"role": "user", "content": "A question about something quite different, this time?"}]
    first = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 12}).json()
    answer = first["choices"][0]["message"]
    messages += [answer, {"role": "user", "content": "Really?"}]
    second = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 12}).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1
    expected = model.chat([{"role": m["role"], "content": m["content"]} for m in messages], max_tokens=12).text
    assert second["choices"][0]["message"]["content"] == expected


def test_errors_reach_the_client_as_its_own(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here, only tiny"):
        openai_client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="audio is not supported here"):
        openai_client.chat.completions.create(model="tiny", messages=MESSAGES, audio={"voice": "x", "format": "wav"})


def test_completions_and_models_with_the_client(openai_client: openai.OpenAI, model: Model) -> None:
    assert [each.id for each in openai_client.models.list()] == ["tiny"]
    answer = openai_client.completions.create(model="tiny", prompt="The king", max_tokens=9)
    assert answer.choices[0].text == model.generate("The king", max_tokens=9).text
    stream = openai_client.completions.create(model="tiny", prompt="The king", max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_a_stream_by_hand_begins_with_the_role(client: httpx.Client) -> None:
    found = events(client, "/v1/chat/completions", messages=MESSAGES, max_tokens=3)
    assert found[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert {event["object"] for event in found} == {"chat.completion.chunk"}
