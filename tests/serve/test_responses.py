"""/v1/responses, with OpenAI's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from entrollm import Model
from entrollm.serve.output.choose import choose
from tests.serve.running import Running
from tests.serve.test_refusals import refused
from tests.serve.test_structured import KING, say

PATH = "/v1/responses"
NOW: Any = {"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}}, "strict": False}
CALL = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'


@pytest.fixture
def openai_client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(server: Running) -> Model:
    return server.models[0].model


def test_a_text(openai_client: openai.OpenAI, model: Model) -> None:
    answer = openai_client.responses.create(
        model="tiny", input="Who was the king?", instructions="Be brief.", max_output_tokens=12
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was the king?"}]
    assert answer.output_text == model.chat(messages, max_tokens=12).text
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(model.encode_chat(messages)), 12)


def test_a_stream(openai_client: openai.OpenAI, model: Model) -> None:
    seen = list(openai_client.responses.create(model="tiny", input="Who?", max_output_tokens=12, stream=True))
    text = model.chat([{"role": "user", "content": "Who?"}], max_tokens=12).text
    assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == text
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert [event.type for event in seen[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert seen[-1].type == "response.incomplete"
    assert seen[-1].response.output_text == text


def test_reasoning_text_and_calls(
    openai_client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.models[0], "output", choose("tools <tool_call> </think>"))
    say(monkeypatch, server, f"<think>Hm.</think>I look.{CALL}{CALL}")
    answer = openai_client.responses.create(model="tiny", input="When?", tools=[NOW])
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    assert answer.status == "completed"
    assert answer.output_text == "I look."
    first: Any = answer.output[0]
    assert first.content[0].text == "Hm."
    call: Any = answer.output[2]
    assert (call.name, call.arguments) == ("now", "{}")
    with openai_client.responses.stream(model="tiny", input="When?", tools=[NOW], parallel_tool_calls=False) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    assert kinds.count("response.function_call_arguments.done") == 1
    assert final.output_text == "I look."


def test_a_dialogue_with_calls(client: httpx.Client, model: Model) -> None:
    body = {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "When?"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "c1", "name": "now", "arguments": '{"zone": "Rome"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        ],
        "tools": [NOW],
        "max_output_tokens": 1,
    }
    answer = client.post(PATH, json=body).json()
    function = {"name": "now", "arguments": {"zone": "Rome"}}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "noon"},
    ]
    parameters = {"name": "now", "parameters": NOW["parameters"], "strict": False}
    tools = [{"type": "function", "function": parameters}]
    assert answer["usage"]["input_tokens"] == len(model.encode_chat(messages, tools=tools))


def test_json_and_forced_calls(client: httpx.Client) -> None:
    form = {"type": "json_schema", "name": "king", "schema": KING}
    body: dict[str, Any] = {"input": "x", "text": {"format": form}, "max_output_tokens": 150}
    answer = client.post(PATH, json=body | {"temperature": 1.5, "seed": 1}).json()
    assert set(json.loads(answer["output"][0]["content"][0]["text"])) == {"name", "age", "mood"}
    body = {"input": "x", "tools": [NOW], "tool_choice": {"type": "function", "name": "now"}, "max_output_tokens": 90}
    answer = client.post(PATH, json=body | {"parallel_tool_calls": False}).json()
    assert [item["type"] for item in answer["output"]] == ["function_call"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id", "is not supported here"),
        ({"input": "x", "store": True}, "store", "should be False"),
        ({"input": "x", "background": 0}, "background", "should be false"),
        ({"input": [{"type": "input_image"}]}, "input.0", "type should be message, function_call"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format.schema", "needs schema"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0", ""),
        ({}, "input", "the field input is missing"),
    ],
)
def test_bad_requests(client: httpx.Client, body: dict[str, Any], param: str, message: str) -> None:
    error = refused(client.post(PATH, json=body), 400)
    assert message in error["message"]
    assert (error["param"] or "").startswith(param)
