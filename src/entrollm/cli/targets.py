"""The options that ask for a size, shared by `compress` and `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from entrollm.compress.target import Target

BpwOption = Annotated[
    float | None,
    typer.Option("--bpw", metavar="R", help="Bits per weight of the files, everything included; any fraction."),
]
FitOption = Annotated[
    str | None, typer.Option("--fit", metavar="SIZE", help="Size of the files, such as 1.9GB; never exceeded.")
]


def parse_target(bpw: float | None, fit: str | None, bits: Sequence[str] | None = None) -> Target | None:
    """The target that the options name, or None for none.

    Raises:
        ValueError: two of them are given, or a value is wrong.
    """
    from entrollm.compress.target import Target, parse_size

    if bpw is None and fit is None:
        return None
    if bits or (bpw is not None and fit is not None):
        raise ValueError("give one of --bits, --bpw and --fit; they all decide the size")
    return Target(bits_per_weight=bpw) if fit is None else Target(file_bytes=parse_size(fit))
