"""Wrong usage with --json, and the names that other tools give to options."""

import json

import pytest
from typer.testing import CliRunner

from entrollm.cli.main import app
from entrollm.cli.usage import OTHER_NAMES, normalize_option
from tests.support.paths import TINY_LLAMA


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "--json"], "OUT"),
        (["run", "x", "--json", "--threads", "x"], "--threads"),
        (["run", "x", "--nonsense", "--json"], "--nonsense"),
        (["compres", "--json"], "compress"),
        (["compare", "--json", "-"], "ORIGINAL"),
        (["compare", "a", "b", "--json=-"], "--text"),
    ],
)
def test_usage_errors_are_an_object_with_json(args: list[str], message: str) -> None:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "UsageError"
    assert message in error["message"]
    assert result.stderr  # and still explained


def test_usage_errors_are_no_object_without_json() -> None:
    assert CliRunner().invoke(app, ["run"]).stdout == ""
    assert CliRunner().invoke(app, ["compare", "--json", "file"]).stdout == ""


def test_errors_of_compare_are_an_object_where_its_json_goes_to_stdout() -> None:
    result = CliRunner().invoke(app, ["compare", "a", "b", "--text", "/no/text", "--json", "-"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "FileNotFoundError"


@pytest.mark.parametrize("option", ["-n", "--max-tokens", "--max_tokens", "--n-predict", "--max-new-tokens"])
def test_names_of_other_tools_are_accepted(option: str) -> None:
    result = CliRunner().invoke(app, ["run", str(TINY_LLAMA), "-p", "The king", option, "3", "--json"])
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["token_ids"]) == 3


def test_commands_agree_on_the_name_of_windows() -> None:
    for arguments in (["eval", "/no/model", "--text", "/no/text"], ["demo", "--model", "/no/model"]):
        for option in ("--max-windows", "--windows", "--max_windows"):
            result = CliRunner().invoke(app, [*arguments, option, "2"])
            assert result.exit_code == 1, result.stderr  # no usage error, which is 2
        assert "--windows" not in CliRunner().invoke(app, [arguments[0], "--help"]).stdout


def test_other_names_belong_to_options_that_there_are() -> None:
    commands = [command.name or "" for command in app.registered_commands]
    helps = "".join(CliRunner().invoke(app, [name, "--help"]).stdout for name in commands)
    for other, name in OTHER_NAMES.items():
        assert f"--{name} " in helps
        assert normalize_option(other) == name
