"""Options of the Python API as flags."""

from dataclasses import fields
from pathlib import Path

import pytest
import typer

from entrollm import CompressOptions
from entrollm.cli.flags import flag, write_flags
from entrollm.cli.main import app
from entrollm.errors import Option, Placeholder

# Options of the API that the command line does not have.
_PYTHON_ONLY = {"seed", "shard_bytes"}


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (Option("max_kl"), "--max-kl"),
        (Option("size", "1.9GB"), "--fit 1.9GB"),
        (Option("processor", "arm"), "--target arm"),
        (Option("overwrite", True), "--overwrite"),
        (Option("drift", False), "--no-drift"),
        (Option("keep", ["lm_head*", "a.weight"]), "--keep 'lm_head*' --keep a.weight"),
        (Option("overrides", {"lm_head*": 8}), "--bits 'lm_head*=8'"),
        (Option("tokenizer", Placeholder("FOLDER")), "--tokenizer FOLDER"),
        (Option("overrides", {Placeholder("GLOB"): Placeholder("N")}), "--bits GLOB=N"),
        (Option("calibration", Path("my text.txt")), "--calibration 'my text.txt'"),
    ],
)
def test_options_are_written_as_they_are_typed(option: Option, text: str) -> None:
    assert write_flags(option) == text


def test_every_option_of_the_api_has_its_flag() -> None:
    command = typer.main.get_command(app)
    assert hasattr(command, "commands")
    flags = {opt for parameter in command.commands["compress"].params for opt in parameter.opts}
    names = {field.name for field in fields(CompressOptions)}
    assert names >= _PYTHON_ONLY
    assert {flag(name) for name in names - _PYTHON_ONLY} <= flags


def test_the_command_has_no_option_that_the_api_lacks() -> None:
    command = typer.main.get_command(app)
    names = {parameter.name for parameter in command.commands["compress"].params}
    of_the_call = {"model", "out", "overwrite", "json_output"}
    assert names - of_the_call == {field.name for field in fields(CompressOptions)} - _PYTHON_ONLY - {"overrides"}
