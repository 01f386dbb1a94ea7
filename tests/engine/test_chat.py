"""Chat templates against transformers, their sandbox and their errors."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from entrollm.engine.chat import ChatTemplate
from entrollm.engine.files import read_model_files
from entrollm.errors import FormatError, UnsupportedError
from tests.engine.dense import load_dense
from tests.support.paths import TINY_LLAMA

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
DIALOGUE = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": " Hello "},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Where is “Zürich”?"},
]
LOOP = """{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% continue %}
    {% endif %}
    {% if message.role not in ['user', 'assistant'] %}
        {{ raise_exception('unknown role ' ~ message.role) }}
    {% endif %}
<|{{ message.role }}|>{{ message.content | trim }}{{ eos_token }}
    {% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{% endgeneration %}

    {% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
"""
JSON = "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{% if tools %}{{ tools }}{% endif %}"
NAMESPACE = (
    "{% set state = namespace(count=0) %}{% for m in messages %}{% set state.count = state.count + 1 %}{% endfor %}"
    "{{ state.count }}{{ messages[1:] | map(attribute='role') | join(',') }}{{ messages[-1]['content'].strip() }}"
)


def render(template: str, **variables: object) -> str:
    return ChatTemplate(template, "chat template", SPECIAL_TOKENS).render(DIALOGUE, **variables)


@pytest.mark.parametrize("template", [LOOP, JSON, NAMESPACE])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_renders_like_transformers(template: str, add_generation_prompt: bool) -> None:
    expected, _ = render_jinja_template(
        conversations=[DIALOGUE],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        **SPECIAL_TOKENS,
    )
    assert render(template, add_generation_prompt=add_generation_prompt) == expected[0]


def test_variables_and_date() -> None:
    assert render("{{ enable_thinking }} {{ strftime_now('%Y') }}", enable_thinking=False) == (
        f"False {datetime.now().year}"
    )


def test_a_refusal_is_the_callers_mistake() -> None:
    template = ChatTemplate(LOOP, "chat template", SPECIAL_TOKENS)
    with pytest.raises(ValueError, match="chat template refuses these messages: unknown role tool"):
        template.render([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "folder: the chat template is not valid: "),
        ("{{ messages[9].content }}", "folder: the chat template failed: "),
        ("{{ 1 / 0 }}", "the chat template failed: division by zero"),
        ("{{ messages + 1 }}", "the chat template failed: "),
        ("{{ ''.__class__.__mro__ }}", "the chat template failed: .*unsafe"),
        ("{{ messages.append(1) }}", "the chat template failed: .*unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "the chat template failed: .*recursion"),
    ],
)
def test_broken_templates(template: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ChatTemplate(template, "folder", {}).render(DIALOGUE)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ '%0999999999d' % 1 }}", "the chat template failed: it takes too much memory"),
        ("{{ '{:0999999999d}'.format(1) }}", "the chat template failed: it takes too much memory"),
        ("{{ 'a' * 10 ** 10 }}", "the chat template failed: it takes too much memory"),
        ("{% set s = namespace(x='ab') %}{% for i in range(40) %}{% set s.x = s.x ~ s.x %}{% endfor %}", "memory"),
        ("{{ 'a' * (2 ** 26 + 1) }}", "it made 67108865 characters, at most 67108864 are allowed"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
        ("{{ 10 ** (10 ** 8 * messages | length) }}", "it took more than 1 seconds"),
        (
            "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
            "it took more than 1 seconds",
        ),
        ("{% if 1 %}" * 150 + "{% endif %}" * 150, "the chat template is not valid: "),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "the chat template is not valid: too many .* nested"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "the chat template is not valid: "),
    ],
)
def test_hostile_templates_end_soon_and_the_next_dialogue_works(template: str, message: str) -> None:
    hostile = "{% if messages[0].role == 'user' %}ok{% else %}" + template + "{% endif %}"
    chat = ChatTemplate(hostile, "folder", {}, seconds=1 if "1 seconds" in message else 60)
    with pytest.raises(FormatError, match=message):
        chat.render(DIALOGUE)
    if "not valid" not in message:
        assert chat.render(DIALOGUE[1:]) == "ok"


def test_a_template_that_is_not_compiled_in_time_is_refused() -> None:
    chat = ChatTemplate("{{ 10 ** (10 ** 9) }}", "folder", {}, seconds=1)  # compilers compute constants
    with pytest.raises(FormatError, match="it took more than 1 seconds"):
        chat.render(DIALOGUE)


def test_a_template_is_compiled_when_it_is_used(tmp_path: Path) -> None:
    folder = copy_example(tmp_path)
    (folder / "chat_template.jinja").write_text("{% for %}")
    model = load_dense(folder)
    assert model.has_chat_template and model.generate("The king", max_tokens=2).text
    with pytest.raises(FormatError, match="the chat template is not valid"):
        model.chat([{"role": "user", "content": "Hi"}])


def test_templates_in_threads_and_forked_processes() -> None:
    chat = ChatTemplate("{{ messages[0].content }}", "folder", {})
    texts = [f"text {number} é \U0001f600" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(chat.render, [[{"role": "user", "content": text}] for text in texts]))
    assert found == texts
    worker = chat._worker
    assert worker is not None
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if chat.render(DIALOGUE[1:]) == " Hello " and chat._worker is not worker else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert chat.render(DIALOGUE[1:]) == " Hello " and chat._worker is worker
    del chat
    assert worker.poll() is not None


def test_values_that_are_not_json_are_refused() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        render("", tools=[object()])


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], ValueError, "messages should not be empty"),
        ("Hello", TypeError, "messages should be a list of .* got str"),
        ({"role": "user"}, TypeError, "messages should be a list of .* got dict"),
        ([{"content": "x"}], TypeError, "each message should be a mapping with a string 'role'"),
    ],
)
def test_malformed_messages(messages: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ChatTemplate("", "chat template", {}).render(messages)  # type: ignore[arg-type]


def copy_example(folder: Path) -> Path:
    for path in TINY_LLAMA.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_chat_generates_from_the_template(tmp_path: Path) -> None:
    folder = copy_example(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}")
    model = load_dense(folder)
    ids = model.encode_chat([{"role": "user", "content": "A dog"}])
    assert ids == model.encode("<s>A dog\n")
    pieces: list[str] = []
    result = model.chat([{"role": "user", "content": "A dog"}], max_tokens=6, on_text=pieces.append)
    assert result.token_ids == model.generate(ids, max_tokens=6).token_ids
    assert "".join(pieces) == result.text


def test_no_chat_template() -> None:
    with pytest.raises(UnsupportedError, match="this model has no chat template; use generate"):
        load_dense(TINY_LLAMA).chat([{"role": "user", "content": "Hi"}])


def write_template(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_text(text)


def test_where_templates_come_from(tmp_path: Path) -> None:
    folder = copy_example(tmp_path)
    assert read_model_files(folder).chat_template is None
    write_template(folder, "chat_template.json", '{"chat_template": "legacy"}')
    assert read_model_files(folder).chat_template == "legacy"
    named = '{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}]}'
    write_template(folder, "tokenizer_config.json", named)
    assert read_model_files(folder).chat_template == "named"
    write_template(folder, "tokenizer_config.json", '{"chat_template": "plain"}')
    assert read_model_files(folder).chat_template == "plain"
    write_template(folder, "chat_template.jinja", "own file")
    assert read_model_files(folder).chat_template == "own file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"chat_template": [{"name": "rag", "template": "x"}]}', "list without an entry named 'default'"),
        ('{"chat_template": 5}', "chat_template should be a string or a list, found int"),
    ],
)
def test_malformed_template_entries(tmp_path: Path, text: str, message: str) -> None:
    folder = copy_example(tmp_path)
    write_template(folder, "tokenizer_config.json", text)
    with pytest.raises(FormatError, match=re.escape(message)):
        read_model_files(folder)
