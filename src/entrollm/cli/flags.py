"""Options of the Python API as flags of the command line, for messages that name them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from entrollm.errors import Option, Placeholder

# Every other option has the flag of its name.
_FLAGS = {"size": "--fit", "processor": "--target", "overrides": "--bits"}


def flag(name: str) -> str:
    """The flag of an option: `max_kl` is --max-kl."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def write_flags(option: Option) -> str:
    """An option as it is typed, such as --keep 'lm_head*'; lists and mappings repeat their flag."""
    name, value = flag(option.name), option.value
    if value is None or value is True:
        return name
    if value is False:
        return name.replace("--", "--no-", 1)
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_quote(f'{key}={item}')}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(f"{name} {_quote(item)}" for item in value)
    return f"{name} {_quote(value)}"


def _quote(value: object) -> str:
    return str(value) if isinstance(value, Placeholder) else shlex.quote(str(value))
