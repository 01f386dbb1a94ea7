"""Answers that must be JSON, and calls of tools."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrollm.serve.tool_calls import ToolCall, ToolCallFinder
from tests.serve.running import Running
from tests.serve.test_completions import events
from tests.serve.test_refusals import refused

CHAT = "/v1/chat/completions"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Describe the king."}], "max_tokens": 150}
KING = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "mood": {"enum": ["gay", "grim"]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Köln"]}, "days": {"type": "integer", "maximum": 9}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def chat(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(CHAT, json=ASK | body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_is_satisfied(client: httpx.Client, seed: int) -> None:
    choice = chat(client, response_format=schema_format(KING), temperature=1.5, seed=seed)
    value = json.loads(choice["message"]["content"])
    assert choice["finish_reason"] == "stop"
    assert set(value) == {"name", "age", "mood"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert 0 <= value["age"] <= 99
    assert value["mood"] in ("gay", "grim")


def test_choices_and_streams_have_grammars_of_their_own(client: httpx.Client) -> None:
    body = ASK | {"response_format": schema_format(KING), "temperature": 1.5, "seed": 1, "n": 3}
    whole = client.post(CHAT, json=body).json()["choices"]
    texts = [choice["message"]["content"] for choice in whole]
    assert len({json.dumps(json.loads(text)) for text in texts}) == 3
    pieces = [event["choices"][0] for event in events(client, CHAT, **body)]
    for index, text in enumerate(texts):
        parts = [piece["delta"].get("content", "") for piece in pieces if piece["index"] == index]
        assert "".join(parts) == text


def test_any_object(client: httpx.Client) -> None:
    choice = chat(client, response_format={"type": "json_object"}, temperature=1.0, seed=5, max_tokens=400)
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (schema_format({"type": "king"}), "response_format: Invalid type: king"),
        (schema_format({"type": "object", "if": {}}), 'response_format: Unimplemented keys: ["if"]'),
        (schema_format({"$ref": "file:///etc/passwd"}), "response_format: "),
        (schema_format({"enum": ["x" * 70000]}), "the schema is longer than 65536 bytes"),
        ({"type": "json_schema"}, "needs json_schema"),
        ({"type": "xml"}, "response_format.type: Input should be 'text', 'json_object' or 'json_schema'"),
    ],
)
def test_bad_formats(client: httpx.Client, form: dict[str, Any], message: str) -> None:
    error = refused(client.post(CHAT, json=ASK | {"response_format": form}), 400)
    assert message in error["message"]
    assert "root:" not in error["message"]


def check_call(call: Any) -> None:
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "weather":
        assert set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Rome", "Köln")
        assert arguments["days"] <= 9
    else:
        assert call["function"]["name"] == "now"


def test_a_tool_that_must_be_called(client: httpx.Client) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for seed in range(3):
        choice = chat(
            client,
            tools=TOOLS,
            tool_choice=named,
            parallel_tool_calls=False,
            temperature=1.5,
            seed=seed,
            max_tokens=300,
        )
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "weather"
        check_call(call)


def test_calls_in_a_stream_of_the_client(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "How is the weather?"}],
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "weather"}},
            parallel_tool_calls=False,
            max_tokens=300,
            stream=True,
        )
        chunks = [chunk.choices[0] for chunk in stream]
    calls = [call.model_dump() for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [call["index"] for call in calls] == [0]
    check_call(calls[0])
    assert chunks[-1].finish_reason == "tool_calls"
    assert not any(chunk.delta.content for chunk in chunks)


def say(monkeypatch: pytest.MonkeyPatch, server: Running, text: str) -> None:
    """Let the model say `text`, a few characters at a time."""
    kind = type(server.models[0].model.new_answer([5], continues_text=False))
    push = kind.push
    pieces = [text[i : i + 5] for i in range(0, len(text), 5)]

    def said(self: Any, logits: Any) -> tuple[int, str]:
        token, _ = push(self, logits)
        self.finish_reason = "unfinished" if self.tokens < len(pieces) else "stop"
        return token, pieces[self.tokens - 1]

    monkeypatch.setattr(kind, "push", said)


def test_text_and_calls(client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = ['{"name": "weather", "arguments": {"city": "Rome", "days": 2}}', '{"name": "now", "arguments": {}}']
    say(monkeypatch, server, "I look.\n" + "".join(f"<tool_call>\n{call}\n</tool_call>\n" for call in calls))
    choice = chat(client, tools=TOOLS)
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "I look."
    found = [call["function"] for call in choice["message"]["tool_calls"]]
    assert [(call["name"], json.loads(call["arguments"])) for call in found] == [
        ("weather", {"city": "Rome", "days": 2}),
        ("now", {}),
    ]
    pieces = [event["choices"][0] for event in events(client, CHAT, **ASK, tools=TOOLS)]
    streamed = [call for piece in pieces for call in piece["delta"].get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in streamed] == [(0, "weather"), (1, "now")]
    assert "".join(piece["delta"].get("content") or "" for piece in pieces).strip() == "I look."
    assert pieces[-1]["finish_reason"] == "tool_calls"
    # Without tools the text is text.
    assert "<tool_call>" in chat(client, tools=TOOLS, tool_choice="none")["message"]["content"]


def test_the_template_sees_tools_and_earlier_calls(client: httpx.Client, server: Running) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "Köln"}'}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    answer = client.post(CHAT, json={"messages": messages, "tools": TOOLS, "max_tokens": 1}).json()
    model = server.models[0].model
    known = [
        {"role": "user", "content": "What time is it?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "now", "arguments": {"zone": "Köln"}}}],
        },
        {"role": "tool", "content": "noon"},
    ]
    assert answer["usage"]["prompt_tokens"] == len(model.encode_chat(known, tools=TOOLS))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tools": [*TOOLS, TOOLS[1]]}, "two tools have the same name"),
        ({"tool_choice": "required"}, "tool_choice names no function of tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names no function"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "cannot be combined"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "x", "parameters": {"if": 1}}}],
            },
            "tools: ",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "x", "arguments": "[1]"}}],
                    }
                ]
            },
            "the arguments of the call 'c' are not a JSON object",
        ),
    ],
)
def test_bad_tools(client: httpx.Client, body: dict[str, Any], message: str) -> None:
    assert message in refused(client.post(CHAT, json=ASK | body), 400)["message"]


def test_templates_without_tools(client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.models[0].model, "_template_text", "{{ messages }}")
    error = refused(client.post(CHAT, json=ASK | {"tools": TOOLS}), 400)
    assert "the chat template of tiny has no tools of the form <tool_call>" in error["message"]


def split(text: str, cuts: list[int]) -> list[str | tuple[str, str]]:
    """What a finder makes of a text in pieces, with neighbouring texts joined."""
    finder = ToolCallFinder(["f"])
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    items: list[str | ToolCall] = []
    for start, end in zip([0, *ends], ends, strict=False):
        items += finder.push(text[start:end])
    items += finder.finish()
    joined: list[str | tuple[str, str]] = []
    for item in items:
        if isinstance(item, ToolCall):
            joined.append((item.name, item.arguments))
        elif joined and isinstance(joined[-1], str):
            joined[-1] += item
        else:
            joined.append(item)
    return joined


GOOD = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
PARTS = ["a ", "\n", "<tool", "_call>", "</tool_call>", GOOD, "<tool_call>{", '{"name": "f"}', "<", "é"]


@given(st.lists(st.sampled_from(PARTS), max_size=6).map("".join), st.lists(st.integers(0, 200), max_size=8))
def test_how_a_text_is_cut_changes_nothing(text: str, cuts: list[int]) -> None:
    assert split(text, cuts) == split(text, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", ["plain"]),
        (GOOD, [("f", '{"a": 1}')]),
        (f"x \n{GOOD}", ["x", ("f", '{"a": 1}')]),
        (GOOD.removesuffix("</tool_call>"), [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "g", "arguments": {}}</tool_call>', None),
        ('<tool_call>{"name": "f", "arguments": 3}</tool_call>', None),
        ("<tool_call>not JSON</tool_call> and more", None),
        ("a < b and <tool_call", None),
        ("ends in space \n", None),
    ],
)
def test_what_is_a_call(text: str, expected: list[Any] | None) -> None:
    assert split(text, []) == ([text] if expected is None else expected)
