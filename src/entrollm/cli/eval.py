"""`entrollm eval`: perplexity of models on a text, and their divergence from a reference model."""

from __future__ import annotations

from typing import Annotated

import typer

from entrollm.cli.console import JsonOption, MemoryOption, ThreadsOption, json_safe, print_json
from entrollm.cli.measured import BosOption, MaxWindowsOption, TextOption, TextOptions, WindowOption, measure

EXAMPLES = (
    ("entrollm eval OUT --text wiki.txt", "perplexity"),
    ("entrollm eval OUT --text wiki.txt --against MODEL", "and KL divergence"),
    ("entrollm eval A B C --text wiki.txt --against MODEL", "one table"),
    ("entrollm eval OUT --text wiki.txt --max-windows 20 --json", "for scripts"),
)


def command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="OUT...", help="Model folders or Hub ids, compressed or not.", show_default=False),
    ],
    text: TextOption,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="Reference model: adds KL(MODEL || OUT).")
    ] = None,
    window: WindowOption = None,
    max_windows: MaxWindowsOption = None,
    bos: BosOption = False,
    threads: ThreadsOption = None,
    memory: MemoryOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Measure perplexity on a text, and the divergence from a reference model.

    The whole text is tokenised at once, by the first model's tokenizer and
    without special tokens, and cut into windows that do not overlap; the
    remainder is dropped. Every window is read from an empty context and gives
    one prediction less than it has tokens. Bits per byte are nats per token /
    ln 2 x tokens / bytes of the text. File bits are those of all weight files,
    per weight, everything included.
    """
    measured = measure(models, against, TextOptions(text, window, max_windows, bos), threads, json_output, memory)
    if json_output:
        print_json(json_safe(measured.to_json()))
    else:
        measured.print_table()
