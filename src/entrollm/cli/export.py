"""`entrollm export`: decode a compressed folder to an ordinary checkpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from entrollm.cli.console import JsonOption, ThreadsOption, print_json, progress_bar, stdout

EXAMPLES = (
    ("entrollm export OUT -o DIR", "decode to the original types"),
    ("entrollm export OUT -o DIR --dtype f32", "keep the dequantized values exactly"),
    ("entrollm export OUT -o DIR --base BASE", "restore what was compressed with --base"),
)


class DataType(StrEnum):
    """The type of the decoded matrices."""

    original = "original"
    bf16 = "bf16"
    f16 = "f16"
    f32 = "f32"


def command(
    model: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder made by `entrollm compress`.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The checkpoint folder to make.", show_default=False)
    ],
    dtype: Annotated[
        DataType, typer.Option("--dtype", help="Type of the decoded matrices; f32 holds them exactly.")
    ] = DataType.original,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="The base of OUT, if that was compressed with one: a folder or a Hub id."
        ),
    ] = None,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Decode a compressed folder to a checkpoint that any Hugging Face tool can read.

    The weights are those of the compressed model, rounded to the type that --dtype names; the original's are not
    restored, unless it was compressed with --lossless. --base restores a model from its differences to another one.
    """
    from contextlib import nullcontext

    from entrollm.checkpoint.model_folder import Checkpoint
    from entrollm.checkpoint.resolve import resolve
    from entrollm.compress.export import export
    from entrollm.format.reader import CompressedModel
    from entrollm.report import format_bytes, format_count
    from entrollm.threads import start_pool

    pool = start_pool(threads)
    with (
        CompressedModel.open(model, restores=base is not None) as opened,
        Checkpoint.open(resolve(base)) if base is not None else nullcontext() as theirs,
        progress_bar("exporting", "weights", quiet=json_output) as update,
    ):
        result = export(opened, out, pool, dtype.value, update, theirs)
    if json_output:
        print_json(result.to_json())
    else:
        size = format_bytes(result.file_bytes)
        stdout.print(f"[bold]{escape(str(out))}[/bold]: {format_count(result.weights)} weights, {size}")
