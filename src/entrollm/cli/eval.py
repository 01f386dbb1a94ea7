"""`entrollm eval`: measure perplexity on a text and the divergence from a reference model, or run tasks of lm-eval."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from entrollm.cli.console import (
    CacheTypeOption,
    CheckOption,
    JsonOption,
    MemoryOption,
    ThreadsOption,
    json_safe,
    print_json,
)
from entrollm.cli.measured import BosOption, MaxWindowsOption, TextOptions, WindowOption, measure
from entrollm.cli.options import read_memory

EXAMPLES = (
    ("entrollm eval OUT --text wiki.txt", "perplexity"),
    ("entrollm eval OUT --text wiki.txt --against MODEL", "and KL divergence from the original"),
    ("entrollm eval A B C --text wiki.txt --against MODEL", "several models in one table"),
    ("entrollm eval OUT --text wiki.txt --max-windows 20 --json", "a quick look, for scripts"),
    ("entrollm eval OUT MODEL --tasks hellaswag,gsm8k --limit 200", "accuracy on tasks of lm-eval"),
)


def command(
    models: Annotated[
        list[str],
        typer.Argument(metavar="OUT...", help="Model folders or Hub ids, compressed or not.", show_default=False),
    ],
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text to predict.", show_default=False)
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The reference model; adds KL(MODEL || OUT).")
    ] = None,
    window: WindowOption = None,
    max_windows: MaxWindowsOption = None,
    bos: BosOption = False,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="A,B", help="Tasks of lm-eval in place of a text; needs entrollm\\[eval]."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Use only the first N documents of each task.")
    ] = None,
    few_shot: Annotated[
        int | None,
        typer.Option("--few-shot", min=0, metavar="N", help="Examples before each question; by default the task's."),
    ] = None,
    include: Annotated[
        Path | None, typer.Option("--include", metavar="FOLDER", help="Further tasks: lm-eval's YAML files.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Lay questions out by the model's chat template.")] = False,
    threads: ThreadsOption = None,
    memory: MemoryOption = "auto",
    cache_type: CacheTypeOption = "f32",
    check: CheckOption = True,
    json_output: JsonOption = False,
) -> None:
    """Measure perplexity on a text and the divergence from a reference model, or run tasks of lm-eval.

    The first model's tokenizer turns the whole text into tokens at once, without special tokens. The tokens are cut
    into windows that do not overlap, and the rest is dropped. Each window is read from an empty context and gives one
    prediction fewer than it has tokens.

    Bits per byte are nats per token / ln 2 x tokens / bytes of the text. File bits are the bits of all weight files per
    weight, everything included. --cache-type is that of the models; the reference has f32.
    """
    if (text is None) == (tasks is None):
        raise ValueError("give either --text FILE or --tasks A,B")
    if text is None:
        from entrollm.cli.task_scores import LoadOptions, TaskOptions, score

        _refuse("--tasks", {"--against": against, "--window": window, "--max-windows": max_windows, "--bos": bos})
        names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
        options = TaskOptions(names, limit, few_shot, include, chat)
        loading = LoadOptions(threads, read_memory(memory), cache_type, check)
        score(models, options, loading, json_output=json_output)
        return
    from entrollm.engine.load import load

    _refuse("--text", {"--limit": limit, "--few-shot": few_shot, "--include": include, "--chat": chat})
    loader = partial(load, threads=threads, memory=read_memory(memory), check=check)
    typed = partial(loader, cache_type=cache_type)
    measured = measure(models, against, TextOptions(text, window, max_windows, bos), typed, json_output, loader)
    if json_output:
        print_json(json_safe(measured.to_json()))
    else:
        measured.print_table()


def _refuse(mode: str, options: dict[str, object]) -> None:
    """Refuse options that belong to the other mode.

    Raises:
        ValueError: one is given.
    """
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be given with {mode}")
