"""`entrollm eval`: measure perplexity on a text, and the divergence from a reference model."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from entrollm.cli.console import CheckOption, JsonOption, MemoryOption, ThreadsOption, json_safe, print_json
from entrollm.cli.measured import BosOption, MaxWindowsOption, TextOption, TextOptions, WindowOption, measure

EXAMPLES = (
    ("entrollm eval OUT --text wiki.txt", "perplexity"),
    ("entrollm eval OUT --text wiki.txt --against MODEL", "and KL divergence from the original"),
    ("entrollm eval A B C --text wiki.txt --against MODEL", "several models in one table"),
    ("entrollm eval OUT --text wiki.txt --max-windows 20 --json", "a quick look, for scripts"),
)


def command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="OUT...", help="Model folders or Hub ids, compressed or not.", show_default=False),
    ],
    text: TextOption,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The reference model; adds KL(MODEL || OUT).")
    ] = None,
    window: WindowOption = None,
    max_windows: MaxWindowsOption = None,
    bos: BosOption = False,
    threads: ThreadsOption = None,
    memory: MemoryOption = "auto",
    check: CheckOption = True,
    json_output: JsonOption = False,
) -> None:
    """Measure perplexity on a text, and the divergence from a reference model.

    The first model's tokenizer turns the whole text into tokens at once, without special tokens. The tokens are cut
    into windows that do not overlap, and the rest is dropped. Each window is read from an empty context and gives one
    prediction fewer than it has tokens.

    Bits per byte are nats per token / ln 2 x tokens / bytes of the text. File bits are the bits of all weight files per
    weight, everything included.
    """
    from entrollm.engine.load import load
    from entrollm.engine.memory import check_memory

    loader = partial(load, threads=threads, memory=check_memory(memory), check=check)
    measured = measure(models, against, TextOptions(text, window, max_windows, bos), loader, json_output)
    if json_output:
        print_json(json_safe(measured.to_json()))
    else:
        measured.print_table()
