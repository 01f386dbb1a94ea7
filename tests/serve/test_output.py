"""What texts of models are split into: reasoning, text and calls, in every format."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from entrollm.engine.detokenize import Detokenizer
from entrollm.serve.grammar import Grammars
from entrollm.serve.output.choose import CALL_FORMATS, REASONING_FORMATS, OutputFormat, check_formats, choose
from entrollm.serve.output.deepseek import DeepSeek
from entrollm.serve.output.glm import Glm
from entrollm.serve.output.items import CallFormat, Item, Reasoning, ToolCall
from entrollm.serve.output.mistral import Mistral
from tests.support.paths import TINY_LLAMA

FUNCTIONS: dict[str, dict[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {"a": {"enum": ["x", "é"]}, "b": {"type": "array", "items": {"type": "integer"}}, "c": True},
        "required": ["a"],
        "additionalProperties": False,
    },
    "g-1": {"type": "object", "properties": {"d": {"type": "boolean"}}, "additionalProperties": False},
}
FUNCTION_GEMMA = choose("tools <start_function_call>").calls
FORMATS: dict[str, CallFormat] = {**CALL_FORMATS, "mistral, one by one": Mistral(is_listed=False)}
FORMATS |= {"deepseek, plain": DeepSeek(is_fenced=False), "glm, on one line": Glm(is_spaced=False)}
assert FUNCTION_GEMMA is not None
FORMATS["function gemma"] = FUNCTION_GEMMA


def split(form: OutputFormat, text: str, cuts: Sequence[int] = (), *, is_open: bool = False) -> list[object]:
    """What a parser makes of a text in pieces, with neighbouring texts joined; calls become pairs."""
    parser = form.parser(FUNCTIONS, is_open=is_open)
    assert parser is not None
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    items: list[Item] = []
    for start, end in zip([0, *ends], ends, strict=False):
        items += parser.push(text[start:end])
    items += parser.finish()
    joined: list[object] = []
    for item in items:
        last = joined[-1] if joined else None
        if isinstance(item, ToolCall):
            joined.append((item.name, json.loads(item.arguments)))
        elif isinstance(item, str) and isinstance(last, str):
            joined[-1] = last + item
        elif isinstance(item, Reasoning) and isinstance(last, Reasoning):
            joined[-1] = Reasoning(last.text + item.text)
        else:
            joined.append(item)
    return joined


def calls_of(name: str, reasoning: str | None = None) -> OutputFormat:
    return OutputFormat(FORMATS[name], REASONING_FORMATS[reasoning] if reasoning else None)


GOOD = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
F: tuple[str, object] = ("f", {"a": 1})
G: tuple[str, object] = ("g-1", {})
# A text, and what it is split into; `None` if it is text as a whole.
CASES: list[tuple[str, str, list[object] | None]] = [
    ("hermes", "plain", None),
    ("hermes", GOOD, [F]),
    ("hermes", f"x \n{GOOD}", ["x", F]),
    ("hermes", f"x {GOOD}\n{GOOD}\n", ["x", F, F]),
    ("hermes", GOOD.removesuffix("</tool_call>"), [F]),
    ("hermes", f"<tool_call>{{ {GOOD}", ["<tool_call>{", F]),
    ("hermes", '<tool_call>{"name": "h", "arguments": {}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "f", "arguments": 3}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": ["f"]}</tool_call>', None),
    ("hermes", "<tool_call>" + "[" * 100_000, None),
    ("hermes", "<tool_call>not JSON</tool_call> and more", None),
    ("hermes", "a < b and <tool_call", None),
    ("hermes", "ends in space \n", None),
    ("llama", '{"name": "f", "parameters": {"a": 1}}', [F]),
    ("llama", ' {"name": "f", "parameters": {"a": 1}}; {"name": "g-1", "parameters": {}}', [F, G]),
    ("llama", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', [F]),
    ("llama", 'So: <|python_tag|>{"name": "f", "arguments": {"a": 1}}', ["So:", F]),
    ("llama", '{"name": "f", "parameters": {"a": "}\\"{"}}', [("f", {"a": '}"{'})]),
    ("llama", '{"name": "f", "parameters": {"a": 1}', None),
    ("llama", '{"kings": 3}', None),
    ("llama", 'It is {"name": "f", "parameters": {"a": 1}}', None),
    ("llama", '{"name": "f", "parameters": {"a": 1}}; and more', [F, "; and more"]),
    ("llama", '<|python_tag|>print("x")', None),
    ("pythonic", "[f(a=1)]", [F]),
    ("pythonic", "<|python_start|>[f(a=1), g-1()]<|python_end|>", [F, G]),
    (
        "pythonic",
        "[f(a=[1, -2.5, 'x]', {\"k\": None, 'l': true}])]",
        [("f", {"a": [1, -2.5, "x]", {"k": None, "l": True}]})],
    ),
    ("pythonic", "[f(1)]", None),
    ("pythonic", "[f(a=b)]", None),
    ("pythonic", "[f(**{})]", None),
    ("pythonic", "[f(a=1), h()]", None),
    ("pythonic", "[1] says so", None),
    ("pythonic", "[it's " + "(" * 5000, None),
    ("pythonic", "See [f(a=1)]", None),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g-1", "arguments": {}}]', [F, G]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', [F]),
    ("mistral", 'Hm. [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g-1[CALL_ID]123456789[ARGS]{}', ["Hm.", F, G]),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', [F]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}', None),
    ("mistral", '[TOOL_CALLS]h[ARGS]{"a": 1}', None),
    ("mistral", "[TOOL_CALLS]" + "f" * 300, None),
    ("gemma", "<|tool_call>call:f{a:1}<tool_call|>", [F]),
    (
        "gemma",
        'Hm.\n<|tool_call>call:f{a:<|"|>x, {y}<|"|>,b:[1,-2.5e3,true,null],c:{d:<|"|><|"|>}}<tool_call|>'
        "<|tool_call>call:g-1{}<tool_call|>",
        ["Hm.", ("f", {"a": "x, {y}", "b": [1, -2500.0, True, None], "c": {"d": ""}}), G],
    ),
    ("gemma", "<|tool_call>call:f{a:}<tool_call|>", None),
    ("gemma", "<|tool_call>call:f{a:1}x<tool_call|>", None),
    ("gemma", '<|tool_call>call:f{a:<|"|>x}<tool_call|>', None),
    ("gemma", "<|tool_call>call:f" + "{a:" * 5000 + "<tool_call|>", None),
    ("function gemma", "<start_function_call>call:f{a:1}<end_function_call>", [F]),
    ("function gemma", "<start_function_call>call:f{a:<escape>x<escape>}", [("f", {"a": "x"})]),
    *(
        ("qwen-coder", f"<tool_call>\n<function=f>\n{inside}</function>\n</tool_call>", found)
        for inside, found in (
            ("<parameter=a>\nx\n</parameter>\n", [("f", {"a": "x"})]),
            ("<parameter=b>\n[1, 2]\n</parameter>\n<parameter=c>\n3\n</parameter>\n", [("f", {"b": [1, 2], "c": 3})]),
            ("<parameter=c>\n\n  two\nlines\n\n</parameter>\n", [("f", {"c": "\n  two\nlines\n"})]),
            ("<parameter=c>null<parameter=a>1</parameter>", [("f", {"c": None, "a": "1"})]),
            ("", [("f", {})]),
            ("and more", None),
        )
    ),
    ("qwen-coder", "Hm.\n<tool_call>\n<function=g-1>\n<parameter=d>\ntrue", ["Hm.", ("g-1", {"d": True})]),
    ("qwen-coder", "<tool_call><function=h></function></tool_call>", None),
    ("qwen-coder", "<tool_call>" + "<function=" * 5000, None),
    ("glm", "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", [("f", {"a": "1"})]),
    (
        "glm",
        "Hm.<tool_call>f<arg_key>b</arg_key><arg_value>[1]</arg_value><arg_key>c</arg_key><arg_value>so</arg_value>"
        "</tool_call>\n<tool_call>g-1</tool_call>",
        ["Hm.", ("f", {"b": [1], "c": "so"}), G],
    ),
    ("glm", "<tool_call>f\n<arg_key>b</arg_key>\n<arg_value>[", [("f", {"b": "["})]),
    ("glm", "<tool_call>f <arg_key>b</arg_key> so</tool_call>", None),
    ("glm", "<tool_call>h</tool_call>", None),
    *(
        ("deepseek", f"<｜tool▁calls▁begin｜>{inside}<｜tool▁calls▁end｜>", found)
        for inside, found in (
            (
                '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g-1\n```json\n{}\n```<｜tool▁call▁end｜>",
                [F, G],
            ),
            ('<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>', [F]),
            ("<｜tool▁call▁begin｜>h<｜tool▁sep｜>{}<｜tool▁call▁end｜>", None),
            ("<｜tool▁call▁begin｜>f{}<｜tool▁call▁end｜>", None),
            ("text<｜tool▁call▁begin｜>g-1<｜tool▁sep｜>{}<｜tool▁call▁end｜>", None),
            ("", None),
        )
    ),
    ("deepseek", "Hm. <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>g-1<｜tool▁sep｜>{}", ["Hm.", G]),
    ("harmony", "plain <|x|>", None),
    ("harmony", "<|channel|>final<|message|>Hello.<|return|>", ["Hello."]),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello.",
        [Reasoning("Hm."), "Hello."],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
        [Reasoning("Hm."), "I look.", F],
    ),
    ("harmony", ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}', [F]),
    ("harmony", '<|channel|>commentary to=functions.f<|message|>{"a": 1', None),
    ("harmony", "<|channel|>commentary to=browser.open<|message|>{}", None),
    ("harmony", "<|channel|>fin", None),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_what_is_a_call(name: str, text: str, expected: list[object] | None) -> None:
    found = split(calls_of(name), text)
    assert found == ([text] if expected is None else expected)
    assert split(calls_of(name), text, range(len(text)) if len(text) < 1000 else ()) == found


INSIDES = {
    "qwen-coder": ["<function=f>", "<function=f><parameter=a>"],
    "glm": ["f", "f<arg_key>", "f<arg_key>a</arg_key>", "f<arg_key>a</arg_key><arg_value>"],
    "deepseek": ["<｜tool▁call▁begin｜>f<｜tool▁sep｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f```"],
    "gemma": ["call:f", "call:f{", "call:f{a"],
    "mistral": ["f", "f[CALL_ID]", "f[CALL_ID]a", "["],
    "llama": ["{"],
    "pythonic": ["[", "[f(a="],
    "harmony": ["analysis<|message|>", "commentary to=functions.f<|message|>"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_white_space_takes_no_long_time(name: str) -> None:
    """Each text takes milliseconds, and seconds to hours where a reader goes back over the white space."""
    space = " " * 100_000
    opening = FORMATS[name].marks[1 if name == "harmony" else 0]
    texts = [opening + inside for inside in ["", *INSIDES.get(FORMATS[name].name, [])]]
    form = calls_of(name, None if name == "harmony" else "think")
    start = time.perf_counter()
    for text in texts:
        split(form, f"{text}{space}x")
    for text in ("", "a", texts[-1]):
        split(form, text + space, range(100_000))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("name", "part"), [("llama", "<|python_tag|>{"), ("pythonic", "<|python_start|>["), ("hermes", "<tool_call>")]
)
def test_openings_without_ends_take_no_long_time(name: str, part: str) -> None:
    text = part * (100_000 // len(part))
    start = time.perf_counter()
    assert split(calls_of(name), text) == [text]
    assert time.perf_counter() - start < 5


def test_names_that_lie_deep() -> None:
    for length in (300, 900, 3000):
        text = f"[f{'.f' * length}(a=1), f{'.f' * length}-f()]"
        assert split(calls_of("pythonic"), text) == [text]


PARTS = ["a ", "\n", "[1", "<", "{", "]", "}", "'", "<think>", "</think>", "f(a=1)", '"name"']
PARTS += [text for _, text, _ in CASES if len(text) < 1000]
PARTS += sorted({mark for form in FORMATS.values() for mark in form.marks})
TEXTS = st.lists(st.sampled_from(PARTS), max_size=5).map("".join)


@given(st.sampled_from(sorted(FORMATS)), TEXTS, st.lists(st.integers(0, 300), max_size=8), st.booleans())
def test_how_a_text_is_cut_changes_nothing(name: str, text: str, cuts: list[int], is_open: bool) -> None:
    form = calls_of(name, None if name == "harmony" else "think")
    assert split(form, text, cuts, is_open=is_open) == split(form, text, is_open=is_open)


@given(st.sampled_from(sorted(set(FORMATS) - {"harmony", "pythonic"})), TEXTS)
def test_without_known_functions_nothing_is_lost(name: str, text: str) -> None:
    parser = FORMATS[name].parser({"unknown": {}})
    found = [*parser.push(text), *parser.finish()]
    assert "".join(item for item in found if isinstance(item, str)) == text


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nHello.", False, [Reasoning("Hm."), "Hello."]),
        ("\nHm.</think>Hello.", True, [Reasoning("Hm."), "Hello."]),
        ("<think>\n\n</think>\n\nHello.", False, ["Hello."]),
        ("Hello <think>.", False, ["Hello <think>."]),
        ("<think>cut off", False, [Reasoning("cut off")]),
        ("<thi", False, ["<thi"]),
        (" \n", False, [" \n"]),
        (f"<think>Hm.</think>{GOOD}", False, [Reasoning("Hm."), F]),
        (f"<think>{GOOD}</think>", False, [Reasoning(GOOD)]),
    ],
)
def test_what_is_reasoning(text: str, is_open: bool, expected: list[object]) -> None:
    form = calls_of("hermes", "think")
    assert split(form, text, is_open=is_open) == expected
    assert split(form, text, range(len(text)), is_open=is_open) == expected


@pytest.mark.parametrize(
    ("template", "calls", "reasoning"),
    [
        (None, None, None),
        ("{{ messages }}", None, None),
        ("{% if tools %}<tool_call>", "hermes", None),
        ("{% if tools %}<tool_call> <think></think>", "hermes", "think"),
        ("{% if tools %}<tool_call>\n<function=name>", "qwen-coder", None),
        ("{% if tools %}<tool_call>name\n<arg_key>k</arg_key>\n<arg_value>", "glm", None),
        ("<｜tool▁calls▁begin｜> </think>", "deepseek", "think"),
        ("{% if tools %}<|python_tag|> <|eot_id|>", "llama", None),
        ("{% if tools %}<|python_start|>[func_name1(a=b)]<|eot|>", "pythonic", None),
        ("{% if tools %}[TOOL_CALLS] [THINK][/THINK]", "mistral", "mistral"),
        ("{% if tools %}<|tool_call>call: <|channel>thought\n<channel|>", "gemma", "gemma"),
        ("{% if tools %}<start_function_call>call:", "gemma", None),
        ("<|start|>assistant<|channel|>final<|message|> </think>", "harmony", None),
    ],
)
def test_formats_are_recognized(template: str | None, calls: str | None, reasoning: str | None) -> None:
    form = choose(template)
    assert (form.calls and form.calls.name, form.reasoning and form.reasoning.name) == (calls, reasoning)


def test_formats_can_be_named() -> None:
    assert choose("", "llama", "think") == OutputFormat(CALL_FORMATS["llama"], REASONING_FORMATS["think"])
    assert choose("tools <tool_call> </think>", "none", "none") == OutputFormat(None, None)
    assert choose("<start_function_call>", "gemma").calls is FUNCTION_GEMMA
    assert choose("").parser({"f": {}}, is_open=False) is None


@pytest.mark.parametrize("properties", [3, [], {"a": 5}, {"a": {"type": [{}], "enum": 1, "anyOf": [7]}}])
def test_schemas_that_are_none(properties: object) -> None:
    texts = {
        "qwen-coder": "<function=f><parameter=a>1</parameter>",
        "glm": "f<arg_key>a</arg_key><arg_value>1</arg_value>",
    }
    for name, inside in texts.items():
        parser = CALL_FORMATS[name].parser({"f": {"properties": properties}})
        (call,) = [*parser.push(f"<tool_call>{inside}</tool_call>"), *parser.finish()]
        assert isinstance(call, ToolCall) and json.loads(call.arguments) == {"a": 1}
        assert "call_0" in CALL_FORMATS[name].grammar({"f": {"properties": properties}}, json.dumps, several=False)


def test_unknown_formats() -> None:
    check_formats("none", "think")
    with pytest.raises(ValueError, match=r"--tool-format should be auto, none, hermes, .* got 'xml'"):
        check_formats("xml", "auto")
    with pytest.raises(ValueError, match=r"--reasoning-format should be auto, none, think, .* got 'harmony'"):
        check_formats("auto", "harmony")


def marked_tokenizer() -> Tokenizer:
    """The example's tokenizer with every marker as a special token."""
    tokenizer = Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [AddedToken(mark, special=True) for mark in sorted({mark for form in FORMATS.values() for mark in form.marks})]
    )
    return tokenizer


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("several", [False, True])
def test_grammars_lead_to_calls(name: str, several: bool) -> None:
    """Any walk through the grammar that prefers late tokens and few characters is parsed as calls."""
    tokenizer = marked_tokenizer()
    ids = tokenizer.get_vocab()
    form = FORMATS[name]
    text = form.grammar(FUNCTIONS, lambda mark: f"<[{ids[mark]}]>", several=several)
    grammar = Grammars(tokenizer, len(ids), [2]).lark(text, "tools")
    answer: list[int] = []
    # Markers and closing brackets first, so that every text is short.
    order = sorted(range(len(ids)), key=lambda token: (-len(tokenizer.id_to_token(token) or ""), token))
    closing = [token for token in order if tokenizer.decode([token]).strip() in {"}", "]", ")", '"', "/"}]
    marks = [ids[mark] for mark in form.marks]
    while len(answer) < 200:
        allowed = grammar.allowed()
        if allowed[2]:
            break
        token = next(token for token in [*marks, *closing, *order] if allowed[token])
        grammar.accept(token)
        answer.append(token)
    shown = Detokenizer(tokenizer, shown=marks)
    written = "".join([*map(shown.push, answer), shown.finish()])
    found = split(OutputFormat(form, None), written)
    calls = [item for item in found if isinstance(item, tuple)]
    assert calls, written
    assert all(isinstance(item, (tuple, Reasoning)) for item in found), written


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize("name", ["qwen-coder", "glm", "glm, on one line", "gemma", "function gemma"])
def test_strings_of_forced_calls_may_be_any(name: str, is_special: bool) -> None:
    """The markers are special tokens or text."""
    text = "if a < b:\n  </p> <"
    lines = "" if name == "glm, on one line" else "\n"
    written = {
        "qwen-coder": f"<tool_call>\n<function=f>\n<parameter=d>\n{text}\n</parameter>\n</function>\n</tool_call>",
        "glm": f"<tool_call>f{lines}<arg_key>d</arg_key>{lines}<arg_value>{text}</arg_value>{lines}</tool_call>",
        "gemma": f'<|tool_call>call:f{{d:<|"|>{text}<|"|>}}<tool_call|>',
        "function gemma": f"<start_function_call>call:f{{d:<escape>{text}<escape>}}<end_function_call>",
    }[name.partition(",")[0]]
    functions = {"f": {"type": "object", "properties": {"d": {"type": "string"}}, "required": ["d"]}}
    tokenizer = marked_tokenizer() if is_special else Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    marks = {mark: f"<[{ids[mark]}]>" if is_special else json.dumps(mark) for mark in FORMATS[name].marks}
    lark = FORMATS[name].grammar(functions, marks.__getitem__, several=False)
    grammar = Grammars(tokenizer, len(ids), [2]).lark(lark, "tools")
    for token in tokenizer.encode(written, add_special_tokens=False).ids:
        assert grammar.allowed()[token], (tokenizer.id_to_token(token), lark)
        grammar.accept(token)
    assert grammar.allowed()[2]
    parser = FORMATS[name].parser(functions)
    (call,) = [*parser.push(written), *parser.finish()]
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments) == {"d": text}


def test_shown_tokens() -> None:
    tokenizer = marked_tokenizer()
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[mark] for mark in ("[TOOL_CALLS]", "[ARGS]")]
    king = tokenizer.encode("king", add_special_tokens=False).ids
    for shown, expected in (([], "{}"), (ids[:1], "[TOOL_CALLS]{}"), (ids, "[TOOL_CALLS]{}[ARGS]")):
        text = Detokenizer(tokenizer, shown=shown)
        pieces = [text.push(token) for token in [ids[0], *king, ids[1]]]
        written = "".join(pieces) + text.finish()
        assert written in (expected.format("king"), expected.format(" king"))
