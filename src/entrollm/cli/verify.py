"""`entrollm verify`: check that a compressed folder is complete and correct."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from entrollm.cli.console import JsonOption, Stopwatch, ThreadsOption, print_json, progress_bar, stdout

EXAMPLES = (
    ("entrollm verify OUT", "check checksums, structure and coding"),
    ("entrollm verify OUT --against MODEL", "and compare the integers with the original's"),
)


def command(
    model: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder made by `entrollm compress`.", show_default=False)
    ],
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The original checkpoint: a folder or a Hub id.")
    ] = None,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check checksums and structure, decode all weights, and encode them again to the same bits.

    --against quantizes the original again: its integers and errors must be the stored ones, and tensors that keep their
    type must be equal. The first difference ends the command with exit code 1.
    """
    from contextlib import nullcontext

    from entrollm.checkpoint.model_folder import Checkpoint
    from entrollm.checkpoint.resolve import resolve
    from entrollm.compress.verify import verify
    from entrollm.format.reader import CompressedModel
    from entrollm.report import format_count, format_rate
    from entrollm.threads import start_pool

    watch = Stopwatch()
    with (
        CompressedModel.open(model, restores=against is None) as opened,
        Checkpoint.open(resolve(against)) if against else nullcontext() as original,
        progress_bar("verifying", "weights", quiet=json_output) as update,
    ):
        result = verify(opened, start_pool(threads), original, update)
    if json_output:
        print_json({"model": str(model), "against": against, "ok": True, **result.to_json()})
        return
    agreement = "; equal to the original's integers" if result.compared else ""
    if result.left_out:
        agreement += f", without buffers that models make themselves ({escape(', '.join(result.left_out))})"
    stdout.print(
        f"[bold green]ok[/bold green] {escape(str(model))}: {result.matrices} matrices, {format_count(result.weights)} "
        f"weights decode and encode exactly, {result.kept} kept tensors{agreement} "
        f"({format_rate(result.weights, watch.elapsed_s, 'weights')})"
    )
