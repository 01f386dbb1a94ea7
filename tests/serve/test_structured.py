"""Answers that must be JSON, and calls of tools."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from entrollm.serve.grammar import GrammarError, Postponed, TokenGrammar
from entrollm.serve.output.choose import choose
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
        (schema_format({"type": "integer", "minimum": 10**400}), "response_format: number out of range"),
        (schema_format({"enum": ["x" * 70000]}), "response_format is longer than 65536 bytes"),
        (schema_format({"enum": [-(2**63)]}), "the number -9223372036854775808, which is not supported"),
        ({"type": "json_schema"}, "needs json_schema"),
        ({"type": "json_object", "syntax": "lark", "definition": "x"}, "json_object has no syntax; leave it out"),
        ({"type": "text", "definition": "x"}, "response_format of type text has no definition; leave it out"),
        ({"type": "xml"}, "response_format.type: Input should be 'text', 'json_object', 'json_schema' or 'grammar'"),
    ],
)
def test_bad_formats(client: httpx.Client, form: dict[str, Any], message: str) -> None:
    error = refused(client.post(CHAT, json=ASK | {"response_format": form}), 400)
    assert message in error["message"]
    assert "root:" not in error["message"]


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]+x"}, "[0-9]{3}-[a-f]+x"),
        ({"guided_choice": ["yes", "no\\"]}, r"yes|no\\"),
        ({"guided_grammar": 'start: "king" /[0-9]{2}/'}, "king[0-9]{2}"),
        ({"guided_json": {"const": [1]}}, r"\[\s*1\s*\]"),
    ],
)
def test_guided_answers(client: httpx.Client, field: dict[str, Any], pattern: str) -> None:
    for path, prompt in ((CHAT, {"messages": ASK["messages"]}), ("/v1/completions", {"prompt": "The king"})):
        body = {**prompt, **field, "temperature": 1.5, "seed": 4, "max_tokens": 80}
        choice = client.post(path, json=body).json()["choices"][0]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, text), text


def test_a_grammar_as_the_format(client: httpx.Client) -> None:
    for syntax, definition in (("regex", "a[bc]{2}"), ("lark", "start: /a[bc]{2}/")):
        choice = chat(client, response_format={"type": "grammar", "syntax": syntax, "definition": definition})
        assert re.fullmatch("a[bc]{2}", choice["message"]["content"])


def test_a_grammar_of_many_rules(client: httpx.Client) -> None:
    """Each refers to the next one, which the compiler follows in a recursion."""
    rules = "\n".join(f"a{index}:a{index + 1}" for index in range(4000))
    definition = f'start: a0\n{rules}\na4000: "x"'
    choice = chat(client, response_format={"type": "grammar", "syntax": "lark", "definition": definition})
    assert choice["message"]["content"] == "x"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"guided_regex": "("}, "guided_regex: "),
        ({"guided_regex": "(?=a)b"}, "guided_regex: "),
        ({"guided_regex": "x" * 70000}, "at most 65536 characters"),
        ({"guided_grammar": "nope"}, "guided_grammar: "),
        ({"guided_grammar": "start: nope"}, "guided_grammar: "),
        ({"guided_choice": []}, "at least 1 item"),
        ({"guided_json": {"type": "king"}}, "guided_json: "),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json and guided_regex cannot be combined"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "cannot be combined"),
        ({"guided_regex": "a", "tools": TOOLS}, "guided_regex and tools cannot be combined"),
        ({"response_format": {"type": "grammar", "syntax": "lark"}}, "needs syntax and definition"),
    ],
)
def test_bad_guides(client: httpx.Client, body: dict[str, Any], message: str) -> None:
    assert message in refused(client.post(CHAT, json=ASK | body), 400)["message"]


def test_a_grammar_that_becomes_too_complex(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: TokenGrammar) -> None:
        raise GrammarError("the grammar of the answer failed: too many states")

    monkeypatch.setattr(TokenGrammar, "_check", fail)
    error = refused(client.post(CHAT, json=ASK | {"guided_regex": "a+"}), 400)
    assert error["code"] == "grammar_failed"


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
    begin, rest = (call for chunk in chunks for call in chunk.delta.tool_calls or [])
    assert begin.index == rest.index == 0
    assert begin.function is not None
    assert rest.function is not None
    assert (begin.function.arguments, rest.id, rest.function.name) == ("", None, None)
    begin.function.arguments = rest.function.arguments
    check_call(begin.model_dump())
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
    assert [(call["index"], call["function"].get("name")) for call in streamed] == [
        (0, "weather"),
        (0, None),
        (1, "now"),
        (1, None),
    ]
    assert "".join(call["function"]["arguments"] for call in streamed) == "".join(call["arguments"] for call in found)
    assert "".join(piece["delta"].get("content") or "" for piece in pieces).strip() == "I look."
    assert pieces[-1]["finish_reason"] == "tool_calls"
    # One call at most: the answer ends behind it.
    choice = chat(client, tools=TOOLS, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]
    assert choice["finish_reason"] == "tool_calls"
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
    monkeypatch.setattr(server.models[0], "output", choose("{{ messages }}"))
    error = refused(client.post(CHAT, json=ASK | {"tools": TOOLS}), 400)
    assert "the chat template of tiny writes no calls of tools that are known here" in error["message"]


def test_reasoning(client: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.models[0], "output", choose("tools <tool_call> </think>"))
    say(monkeypatch, server, '<think>\nKings, kings.\n</think>\n\nI look.\n<tool_call>{"name": "now"}</tool_call>')
    choice = chat(client, tools=TOOLS)
    assert choice["message"]["reasoning_content"] == "Kings, kings."
    assert choice["message"]["content"] == "I look."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    found = events(client, CHAT, **ASK, tools=TOOLS, stream_options={"include_usage": True})
    deltas = [event["choices"][0]["delta"] for event in found if event["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Kings, kings."
    assert "".join(delta.get("content", "") for delta in deltas) == "I look."
    assert 1 <= found[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 5
    # A template may read the reasoning of earlier answers.
    message = {"role": "assistant", "content": "Well.", "reasoning_content": "Hm."}
    assert chat(client, messages=[*ASK["messages"], message, *ASK["messages"]])["finish_reason"] == "stop"


def test_a_schema_begins_behind_the_reasoning(client: httpx.Client, server: Running) -> None:
    served = server.models[0]
    grammar = served.grammars.json_schema({"const": 7}, "response_format")
    end = served.model.end_token_ids[0]
    form = Postponed(grammar, [5, 6], served.model.config.vocab_size, [end])
    twin = form.copy()
    for token in (6, 5, 5, 6):
        assert not form.is_complete
        allowed = form.allowed()
        assert allowed.sum() == len(allowed) - 1
        assert not allowed[end]
        form.accept(token)
    texts = [served.token_text(int(token)).strip() for token in form.allowed().nonzero()[0]]
    assert "7" in texts
    assert set(texts) <= {"7", ""}
    assert twin.allowed().sum() == len(twin.allowed()) - 1
