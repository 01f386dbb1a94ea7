"""`entrollm run`: text on stdout, everything else on stderr, and the options that reach the model."""

import json
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from entrollm.cli.main import app
from entrollm.engine.load import load
from tests.support.gguf_sources import write_gguf
from tests.support.paths import TINY_LLAMA

TINY_LLAMA = str(TINY_LLAMA)


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["run", TINY_LLAMA, *args], input=stdin)


def test_text_goes_to_stdout_and_speed_to_stderr() -> None:
    result = run("-p", "The king", "--max-tokens", "12")
    assert result.exit_code == 0
    assert result.stdout == load(TINY_LLAMA).generate("The king", max_tokens=12).text + "\n"
    assert "12 tokens at " in result.stderr
    assert "for 2 prompt tokens; --max-tokens reached" in result.stderr


def test_json_is_one_object() -> None:
    result = run("-p", "The king", "--max-tokens", "5", "--temperature", "0.9", "--seed", "3", "--json")
    answer = json.loads(result.stdout)
    expected = load(TINY_LLAMA).generate("The king", max_tokens=5, temperature=0.9, seed=3)
    assert (answer["prompt"], answer["text"]) == ("The king", expected.text)
    assert answer["token_ids"] == list(expected.token_ids)
    assert (answer["finish_reason"], answer["prompt_tokens"]) == ("length", 2)
    assert answer["tokens_per_second"] > 0


def test_prompt_from_standard_input() -> None:
    assert run("--max-tokens", "6", stdin="The king").stdout == run("-p", "The king", "--max-tokens", "6").stdout


def test_every_sampling_option_reaches_the_model() -> None:
    greedy = run("-p", "The king", "--max-tokens", "16").stdout
    for option, value in (
        ("--top-k", "1"),
        ("--top-p", "0.0"),
        ("--min-p", "1.0"),
    ):
        assert run("-p", "The king", "--max-tokens", "16", option, value, "--temperature", "5").stdout == greedy
    assert run("-p", "The king", "--max-tokens", "16", "--repetition-penalty", "50").stdout != greedy


def test_stop_ends_the_text() -> None:
    whole = run("-p", "The king", "--max-tokens", "16").stdout
    stop = whole[5:9]
    result = run("-p", "The king", "--max-tokens", "16", "--stop", stop, "--stop", "never")
    assert result.stdout == whole[: whole.index(stop)] + "\n"
    assert "the model ended the text" in result.stderr


def test_a_bad_option_is_one_line() -> None:
    result = run("-p", "x", "--top-p", "2")
    assert result.exit_code == 1
    assert result.stderr == "error: top_p should be from 0 to 1, got 2.0\n"


def test_a_missing_model_is_one_line() -> None:
    result = CliRunner().invoke(app, ["run", "/no/such/folder", "-p", "x", "--json"])
    assert result.exit_code == 1
    assert "/no/such/folder" in json.loads(result.stdout)["error"]["message"]


def test_a_gguf_file_names_the_way_to_run_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "Q8_0")
    (tmp_path / "text.txt").write_text("text")
    for arguments in (["run", "-p", "x"], ["chat"], ["eval", "--text", str(tmp_path / "text.txt")]):
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / "model.gguf")], input="x\n")
        assert result.exit_code == 1
        assert f"`entrollm compress {tmp_path}/model.gguf -o OUT` converts it, then use OUT" in result.stderr
