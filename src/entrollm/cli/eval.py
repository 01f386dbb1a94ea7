"""`entrollm eval`: perplexity of models on a text, and their divergence from a reference model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrollm.cli.console import (
    JsonOption,
    Stopwatch,
    ThreadsOption,
    format_rate,
    json_safe,
    print_json,
    progress_bar,
    stdout,
)

if TYPE_CHECKING:
    from entrollm.engine.model import Model
    from entrollm.evaluate import Evaluation, Windows
    from entrollm.report import QualityRow

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
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to predict.", show_default=False)],
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="Reference model: adds KL(MODEL || OUT).")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window", min=2, metavar="N", help="Tokens read at once; by default 512, or the context if less."
        ),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option("--max-windows", min=1, metavar="N", help="Use only the first N windows.")
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with the model's start token.")] = False,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Measure perplexity on a text, and the divergence from a reference model.

    The whole text is tokenised at once, by the first model's tokenizer and
    without special tokens, and cut into windows that do not overlap; the
    remainder is dropped. Every window is read from an empty context and gives
    one prediction less than it has tokens. Bits per byte are nats per token /
    ln 2 x tokens / bytes of the text.
    """
    from entrollm.engine.load import load
    from entrollm.evaluate import cut_windows, evaluate, read_text

    content = read_text(text)
    loaded = [load(model, threads=threads) for model in models]
    reference = None if against is None else load(against, threads=threads)
    every_model = loaded if reference is None else [*loaded, reference]
    tokenizer = loaded[0].tokenizer
    if tokenizer is None:
        raise ValueError(f"{models[0]} has no tokenizer.json, which reading a text needs")
    windows = cut_windows(tokenizer, content, _protocol(every_model, window, max_windows, bos))
    watch = Stopwatch()
    with progress_bar("evaluating", "tokens", quiet=json_output) as progress:
        evaluations, reference_evaluation = evaluate(loaded, windows, reference, progress)
    measured = list(zip(models, evaluations, strict=True))
    if against is not None and reference_evaluation is not None:
        measured.insert(0, (against, reference_evaluation))
    if json_output:
        print_json(json_safe(_to_json(text, windows, measured, against is not None, watch.elapsed_s)))
    else:
        _print_table(text, windows, measured, watch.elapsed_s)


def _protocol(models: Sequence[Model], window: int | None, max_windows: int | None, bos: bool) -> Any:
    """Choose the window that every model can read."""
    from entrollm.evaluate import DEFAULT_WINDOW, Protocol

    context = min(model.config.context_length for model in models)
    if window is not None and window > context:
        raise ValueError(f"--window {window} is longer than the context of {context} tokens")
    bos_id = models[0].config.bos_token_id if bos else None
    if bos and bos_id is None:
        raise ValueError("--bos: the model's config.json names no bos_token_id")
    return Protocol(window or min(DEFAULT_WINDOW, context), max_windows, bos_id)


def _to_json(
    text: Path, windows: Windows, measured: Sequence[tuple[str, Evaluation]], has_reference: bool, elapsed_s: float
) -> dict[str, Any]:
    results = [
        {"model": name, "file_bytes": _weight_bytes(name), **evaluation.to_json()} for name, evaluation in measured
    ]
    return {
        "text": str(text),
        "window": windows.ids.shape[1],
        "windows": len(windows.ids),
        "elapsed_s": elapsed_s,
        "reference": results[0] if has_reference else None,
        "models": results[1:] if has_reference else results,
    }


def _print_table(text: Path, windows: Windows, measured: Sequence[tuple[str, Evaluation]], elapsed_s: float) -> None:
    from entrollm.report import quality_table

    count, window = windows.ids.shape
    title = f"{text.name}: {count} windows of {window} tokens, {count * (window - 1):,} predictions"
    stdout.print(quality_table(title, [_quality_row(name, evaluation) for name, evaluation in measured]).to_rich())
    rate = format_rate(windows.ids.size * len(measured), elapsed_s, "tokens")
    stdout.print(f"{elapsed_s:.1f} s, {rate} over {len(measured)} model(s)")


def _quality_row(name: str, evaluation: Evaluation) -> QualityRow:
    from entrollm.report import QualityRow

    perplexity, divergence = evaluation.perplexity, evaluation.divergence
    error = perplexity.standard_error
    return QualityRow(
        label=name,
        size_bytes=_weight_bytes(name),
        perplexity=perplexity.perplexity,
        perplexity_error=None if error is None else perplexity.perplexity * error,
        bits_per_byte=perplexity.bits_per_byte,
        kl_nats=None if divergence is None else divergence.mean,
        kl_percentile_99=None if divergence is None else divergence.percentile_99,
        kl_maximum=None if divergence is None else divergence.maximum,
        top1_agreement=None if divergence is None else divergence.top1_agreement,
    )


def _weight_bytes(model: str) -> int:
    from entrollm.checkpoint import resolve

    return sum(file.stat().st_size for file in resolve(model).glob("*.safetensors"))
