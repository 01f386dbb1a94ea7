"""`entrollm chat`: a dialogue over pipes, its commands, and Ctrl-C."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from entrollm.cli.main import app
from entrollm.engine.decoder import Decoder
from entrollm.engine.load import load
from tests.support.paths import TINY_LLAMA

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    for file in TINY_LLAMA.iterdir():
        (path / file.name).symlink_to(file)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def chat(folder: Path, lines: str, *args: str) -> Result:
    return CliRunner().invoke(app, ["chat", str(folder), "--max-tokens", "6", *args], input=lines)


def test_a_dialogue_as_json(folder: Path) -> None:
    result = chat(folder, "Hello\nWhy?\n", "--system", "Be kind.", "--json")
    assert result.exit_code == 0
    dialogue = json.loads(result.stdout)
    roles = [message["role"] for message in dialogue["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    model = load(folder)
    for end in (2, 4):
        expected = model.chat(dialogue["messages"][:end], max_tokens=6)
        assert dialogue["messages"][end]["content"] == expected.text
        assert dialogue["answers"][end // 2 - 1]["token_ids"] == list(expected.token_ids)


def test_answers_go_to_stdout(folder: Path) -> None:
    result = chat(folder, "Hello\n")
    answer = load(folder).chat([{"role": "user", "content": "Hello"}], max_tokens=6).text
    assert result.stdout == f"{answer}\n"
    assert "6 tokens at " in result.stderr


def test_commands(folder: Path) -> None:
    result = chat(folder, "Hello\n/help\n/what\n/reset\n\nHello\n/exit\nnever read\n", "--json")
    dialogue = json.loads(result.stdout)
    assert [message["role"] for message in dialogue["messages"]] == ["user", "assistant"]
    assert len(dialogue["answers"]) == 2
    assert result.stderr.count("/reset forgets the dialogue") == 3
    assert "unknown command /what" in result.stderr
    assert "the dialogue is forgotten" in result.stderr


@pytest.mark.parametrize(("interrupted_call", "kept"), [(1, 4), (3, 6)])
def test_ctrl_c_stops_the_answer_and_not_the_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, interrupted_call: int, kept: int
) -> None:
    """An answer with text is kept as far as it came; a question without one is forgotten."""
    forward = Decoder.forward
    calls = 0

    def interruptible(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        logits = forward(self, *args, **kwargs)
        if calls == interrupted_call:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(Decoder, "forward", interruptible)
    result = chat(folder, "Hello\nWhy?\nWho?\n", "--json")
    assert result.exit_code == 0
    assert "interrupted" in result.stderr
    dialogue = json.loads(result.stdout)
    assert len(dialogue["messages"]) == kept
    monkeypatch.undo()
    expected = load(folder).chat(dialogue["messages"][:-1], max_tokens=6)
    assert dialogue["messages"][-1]["content"] == expected.text, "the cache was started over"


def test_ctrl_c_at_the_prompt_does_not_leave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter([KeyboardInterrupt(), "Hello", EOFError()])

    def read() -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert len(json.loads(chat(folder, "", "--json").stdout)["answers"]) == 1


def test_a_full_context_is_reported_and_the_dialogue_goes_on(folder: Path) -> None:
    result = chat(folder, f"{'word ' * 600}\nHello\n{'word ' * 600}\n")
    assert result.exit_code == 0
    assert "shorten the prompt; try another question\n" in result.stderr
    assert "shorten the prompt; /reset starts over\n" in result.stderr
    assert "6 tokens at " in result.stderr
    assert chat(folder, f"{'word ' * 600}\n", "--json").exit_code == 1


def test_instructions_that_the_template_refuses_are_not_kept_by_advice(folder: Path, tmp_path: Path) -> None:
    refusing = tmp_path / "refusing"
    shutil.copytree(folder, refusing)
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}a"
    (refusing / "chat_template.jinja").write_text(template)
    result = chat(refusing, "Hello\n", "--system", "x")
    assert "no system role; try another question, or start again without --system" in result.stderr
    assert "starts over" not in result.stderr


def test_a_model_without_a_template_is_refused() -> None:
    result = chat(TINY_LLAMA, "Hello\n")
    assert result.exit_code == 1
    assert "has no chat template, so it is not made for dialogue; use entrollm run" in result.stderr


def test_input_that_is_not_utf8_is_said(folder: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(folder), "--max-tokens", "6"], input=b"\xff\xfe\n")
    assert result.exit_code == 1
    assert "error: standard input is not UTF-8 text: " in result.stderr
