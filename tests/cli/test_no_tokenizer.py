"""A model without tokenizer.json: each command that needs it says what there is in its place, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from entrollm.cli.main import app
from tests.support.checkpoints import write_random_llama
from tests.support.gguf_sources import llama_values, write_gguf


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Once upon a time. " * 50)
    return file


def _error(model: Path, text: Path, command: list[str]) -> str:
    arguments = [str({"MODEL": model, "TEXT": text}.get(each, each)) for each in command]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    return result.stderr


@pytest.mark.parametrize(
    ("command", "purpose"),
    [
        (["run", "MODEL", "-p", "Once"], "a prompt"),
        (["chat", "MODEL"], "a dialogue"),
        (["eval", "MODEL", "--text", "TEXT"], "reading a text"),
        (["serve", "MODEL"], "serving"),
    ],
)
def test_what_needs_a_tokenizer_names_it(tmp_path: Path, text: Path, command: list[str], purpose: str) -> None:
    model = write_random_llama(tmp_path, layers=1, tied=True)
    error = _error(model, text, command)
    assert f"{model} has no tokenizer.json, which {purpose} needs" in error
    (model / "tokenizer.model").write_bytes(b"x")
    assert "has no tokenizer.json, only tokenizer.model, which is not read; make one with transformers" in _error(
        model, text, command
    )


@pytest.mark.parametrize("command", [["run", "-p", "Once"], ["serve"]])
def test_gguf_files_are_compressed_first(tmp_path: Path, text: Path, command: list[str]) -> None:
    model = tmp_path / "model.gguf"
    write_gguf(model, "Q4_0", llama_values() | {"tokenizer.ggml.pre": "llama-bpe"})
    error = _error(model, text, [command[0], "MODEL", *command[1:]])
    assert f"`entrollm compress {model} -o OUT` converts it, then use OUT" in error
