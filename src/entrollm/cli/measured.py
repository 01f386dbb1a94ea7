"""Shared by `eval` and `compare`: run models over a text, and show the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrollm.cli.console import Stopwatch, format_rate, progress_bar, stdout

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from entrollm.engine.model import Model
    from entrollm.evaluate import Evaluation, ModelSize, Protocol, Windows
    from entrollm.models.config import ModelConfig
    from entrollm.report import QualityRow, Table

TextOption = Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to predict.", show_default=False)]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        min=2,
        metavar="N",
        help="Tokens read at once; 512 by default, or the context length if that is less.",
    ),
]
MaxWindowsOption = Annotated[
    int | None, typer.Option("--max-windows", min=1, metavar="N", help="Use only the first N windows.")
]
BosOption = Annotated[bool, typer.Option("--bos", help="Begin every window with the model's start token.")]


@dataclass(frozen=True)
class TextOptions:
    """The text, and how to cut it into windows."""

    text: Path
    window: int | None
    max_windows: int | None
    bos: bool


@dataclass(frozen=True)
class MeasuredModel:
    """A model's name, size and figures."""

    name: str
    size: ModelSize
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Everything, with bits per weight."""
        size = {"file_bytes": self.size.file_bytes, "weights": self.size.weights, "file_bits": self.size.file_bits}
        return {"model": self.name, "method": self.size.method, **size, **self.evaluation.to_json()}

    def to_row(self) -> QualityRow:
        """The model's row in the table."""
        from entrollm.report import QualityRow

        perplexity, divergence = self.evaluation.perplexity, self.evaluation.divergence
        error = perplexity.standard_error
        return QualityRow(
            label=self.name,
            size_bytes=self.size.file_bytes,
            bits_per_weight=self.size.file_bits,
            perplexity=perplexity.perplexity,
            perplexity_error=None if error is None else perplexity.perplexity * error,
            bits_per_byte=perplexity.bits_per_byte,
            kl_nats=None if divergence is None else divergence.mean,
            kl_error=None if divergence is None else divergence.standard_error,
            kl_percentile_99=None if divergence is None else divergence.percentile_99,
            kl_maximum=None if divergence is None else divergence.maximum,
            top1_agreement=None if divergence is None else divergence.top1_agreement,
        )


@dataclass(frozen=True)
class Measured:
    """The figures of models on a text; `reference` is `None` if there was none."""

    text: Path
    windows: Windows
    reference: MeasuredModel | None
    models: tuple[MeasuredModel, ...]
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """Everything, one object for each model."""
        return {
            "text": str(self.text),
            "window": self.windows.ids.shape[1],
            "windows": len(self.windows.ids),
            "elapsed_s": self.elapsed_s,
            "reference": None if self.reference is None else self.reference.to_json(),
            "models": [model.to_json() for model in self.models],
        }

    def table(self) -> Table:
        """One row for each model, the reference first."""
        from entrollm.report import quality_table

        every = self.models if self.reference is None else (self.reference, *self.models)
        count, window = self.windows.ids.shape
        title = f"{self.text.name}: {count} windows of {window} tokens, {count * (window - 1):,} predictions"
        return quality_table(title, [model.to_row() for model in every])

    def print_table(self) -> None:
        """Print the table, and how long it took."""
        stdout.print(self.table().to_rich())
        models = len(self.models) + (self.reference is not None)
        rate = format_rate(self.windows.ids.size * models, self.elapsed_s, "tokens")
        stdout.print(f"{self.elapsed_s:.1f} s, {rate} over {models} model(s)")


def measure(
    models: Sequence[str],
    against: str | None,
    options: TextOptions,
    load: Callable[[str], Model],
    quiet: bool,
    load_reference: Callable[[str], Model] | None = None,
) -> Measured:
    """Run models over a text one after the other, and the reference once for all of them.

    Args:
        models: folders or Hub ids.
        against: the reference, or `None`.
        options: the text.
        load: loads a model.
        quiet: show no progress.
        load_reference: loads the reference; by default `load`.
    Raises:
        EntroLLMError, ValueError: a model cannot be run, or the text is not UTF-8 or too short.
        OSError: the text cannot be read.
    """
    from entrollm.checkpoint.resolve import resolve
    from entrollm.engine.files import why_no_tokenizer
    from entrollm.evaluate import cut_windows, evaluate_in_turn, model_size, read_text

    content = read_text(options.text)
    read = [_read_small_files(model) for model in (*models, *(() if against is None else (against,)))]
    tokenizer = next((tokenizer for _, tokenizer in read if tokenizer is not None), None)
    if tokenizer is None:
        raise ValueError(why_no_tokenizer(resolve(models[0]), "reading a text"))
    windows = cut_windows(tokenizer, content, _protocol([config for config, _ in read], options))
    watch = Stopwatch()
    reference = None if against is None else (load_reference or load)(against)
    loaders = [partial(load, model) for model in models]
    with progress_bar("evaluating", "tokens", quiet=quiet) as progress:
        evaluations, reference_evaluation = evaluate_in_turn(loaders, windows, reference, progress)
    measured = [
        MeasuredModel(name, model_size(name), evaluation) for name, evaluation in zip(models, evaluations, strict=True)
    ]
    original = None
    if against is not None and reference_evaluation is not None:
        original = MeasuredModel(against, model_size(against), reference_evaluation)
    return Measured(options.text, windows, original, tuple(measured), watch.elapsed_s)


def _read_small_files(name: str) -> tuple[ModelConfig, Tokenizer | None]:
    """The configuration and the tokenizer of a model, without its weights."""
    from entrollm.checkpoint.model_folder import Checkpoint
    from entrollm.checkpoint.resolve import resolve
    from entrollm.engine.files import read_model_files
    from entrollm.files.shards import is_gguf
    from entrollm.models import read_config
    from entrollm.models.config_fields import Fields

    path = resolve(name)
    if is_gguf(path):
        with Checkpoint.open(path) as checkpoint:
            return read_config(Fields(checkpoint.config, "config.json")), None
    files = read_model_files(path)
    return read_config(Fields(files.config, "config.json")), files.tokenizer


def _protocol(configs: Sequence[ModelConfig], options: TextOptions) -> Protocol:
    """Choose a window that every model can read."""
    from entrollm.evaluate import DEFAULT_WINDOW, Protocol

    context = min(config.context_length for config in configs)
    if options.window is not None and options.window > context:
        raise ValueError(f"--window {options.window} is longer than the context of {context} tokens")
    bos_id = configs[0].bos_token_id if options.bos else None
    if options.bos and bos_id is None:
        raise ValueError("--bos: the model's config.json names no bos_token_id")
    return Protocol(options.window or min(DEFAULT_WINDOW, context), options.max_windows, bos_id)
