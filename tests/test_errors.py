"""Errors whose messages name options, in Python's form and structure."""

import importlib.metadata
import pickle

import pytest

import entrollm
from entrollm.errors import EntroLLMError, FormatError, Message, Option, OptionError, Placeholder, UnsupportedError


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (Option("tune"), "tune"),
        (Option("overwrite", True), "overwrite=True"),
        (Option("keep", ["lm_head*"]), "keep=['lm_head*']"),
        (Option("tokenizer", Placeholder("FOLDER")), "tokenizer=FOLDER"),
        (Option("overrides", {Placeholder("GLOB"): 8}), "overrides={GLOB: 8}"),
    ],
)
def test_options_are_written_as_python(option: Option, text: str) -> None:
    assert str(option) == text


def test_the_package_has_its_version() -> None:
    assert entrollm.__version__ == importlib.metadata.version("entrollm")
    assert "__version__" in dir(entrollm)


def test_braces_in_what_a_message_quotes_are_left_alone() -> None:
    message = Message("{} has {{2}} and {}", "a{0}b", Option("bits", 8))
    assert str(message) == "a{0}b has {2} and bits=8"


def test_messages_may_hold_messages() -> None:
    inner = Message("use {}", Option("device", "cpu"))
    message = Message("wait, or {} ({})", inner, "full")
    assert str(message) == "wait, or use device='cpu' (full)"
    assert message.write(lambda option: option.name.upper()) == "wait, or use DEVICE (full)"


def test_the_hint_follows_the_message() -> None:
    error = UnsupportedError("a is not coded", hint=Message("set {}", Option("keep", ["a"])))
    assert str(error) == "a is not coded; set keep=['a']"
    assert error.describe(lambda option: f"--{option.name}") == "a is not coded; set --keep"
    assert str(FormatError("bad")) == "bad" and FormatError("bad").hint is None
    assert str(EntroLLMError()) == ""


def test_a_wrong_option_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="bits must be 2 to 8, found 9"):
        entrollm.CompressOptions(bits=9)
    assert issubclass(OptionError, EntroLLMError)


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(UnsupportedError("a", hint=Message("set {}", Option("keep", ["a"])))))
    assert str(error) == "a; set keep=['a']"
    assert error.describe(lambda option: f"--{option.name}") == "a; set --keep"
