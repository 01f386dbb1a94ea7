"""The options that `compress` and `plan` share, and how their values are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from entrollm.engine.memory import Memory

BpwOption = Annotated[
    float | None,
    typer.Option("--bpw", metavar="R", help="Bits per weight of the files, everything included; any fraction."),
]
SizeOption = Annotated[
    str | None, typer.Option("--fit", metavar="SIZE", help="Size of the files, such as 1.9GB; never exceeded.")
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="GLOB",
        help="Leave tensors whose names match in their own type. Can be repeated; wins over --bits GLOB=N.",
    ),
]
TrellisOption = Annotated[
    bool,
    typer.Option(
        "--trellis",
        help="Let the weights of a row choose between two grids: as close to the original with 0.13 to 0.2 bits less "
        "per weight. Products are slower, so it is for files that must be small.",
    ),
]
LosslessOption = Annotated[
    bool,
    typer.Option(
        "--lossless",
        help="Keep every bit of the matrices, in two thirds of bf16. Nothing is rounded, so no size is given.",
    ),
]
LosslessForOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lossless-for",
        metavar="GLOB",
        help="Keep every bit of the matrices whose names match, and round the others. Can be repeated; wins over "
        "--bits.",
    ),
]


def read_memory(text: str) -> Memory:
    """The value of --memory: a choice, or a size such as 8GB in bytes.

    Raises:
        ValueError: it is neither.
    """
    from entrollm.compress.target import parse_size
    from entrollm.engine.memory import check_memory

    return check_memory(parse_size(text) if text[:1].isdigit() else text)


def check_new_file(option: str, file: Path) -> None:
    """Check that a file can be made, before the work that it is to keep.

    Args:
        option: that names the file, for errors.
        file: may exist.
    Raises:
        ValueError: something else is there, or its folder does not exist or cannot be written to.
    """
    folder = (file.resolve() if file.is_symlink() else file).parent  # a link stays, and what it leads to is replaced
    if file.exists() and not file.is_file():
        raise ValueError(f"{option} {file} is not a file; name another one")
    if not folder.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {folder}; make it, or name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {file}: the folder {folder} cannot be written to; name a file in another one")


def parse_bits(values: Sequence[str]) -> tuple[int | None, dict[str, int | None]]:
    """Read the values of `--bits N` and `--bits GLOB=N`.

    Args:
        values: in their order; a later value for the same tensors wins.
    Returns:
        The width for all matrices, `None` if no bare number was given, and the widths by glob, in the order in which
        they win over each other.
    Raises:
        ValueError: a value is neither a number nor GLOB=N.
    """
    default: int | None = None
    overrides: dict[str, int | None] = {}
    for value in values:
        pattern, equals, number = value.rpartition("=")
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise ValueError(f"--bits takes N or GLOB=N, such as 4 or 'lm_head*=8'; found {value!r:.80}")
        if equals:
            overrides.pop(pattern, None)  # a glob that is given again wins over those between
            overrides[pattern] = int(number)
        else:
            default = int(number)
    return default, overrides
