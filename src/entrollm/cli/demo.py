"""`entrollm demo`: compress, measure and run the model in examples/."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from entrollm.cli.console import JsonOption, MemoryOption, ThreadsOption, json_safe, print_json, progress_bar, stdout
from entrollm.cli.options import read_memory
from entrollm.cli.progress import ProgressBars

if TYPE_CHECKING:
    from collections.abc import Callable

    from entrollm.codec.choose import Prefer
    from entrollm.engine.model import Model
    from entrollm.evaluate import Evaluation
    from entrollm.recipes.result import CompressResult
    from entrollm.report import QualityRow

EXAMPLES = (
    ("entrollm demo", "compress, measure, generate"),
    ("entrollm demo --table --max-windows 673", "the paper's Table I on the whole text; takes minutes"),
    ("entrollm demo --model MODEL --text FILE", "the same for a model of your own"),
)

_MODEL = Path("examples/tiny-llama")
_TEXT = Path("examples/wikitext-2-test.txt")
_PROMPT = "The history of the city"
# The rows of the paper's Table I: label, grid width, and how the integers are stored.
_VARIANTS: tuple[tuple[str, int, Prefer], ...] = (
    ("uint8", 8, "fixed"),
    ("uint4", 4, "fixed"),
    ("uint8 + Huffman", 8, "size"),
    ("uint4 + Huffman", 4, "size"),
)


def command(
    model: Annotated[Path, typer.Option("--model", metavar="MODEL", help="A checkpoint folder.")] = _MODEL,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to measure on.")] = _TEXT,
    windows: Annotated[
        int, typer.Option("--max-windows", min=1, metavar="N", help="Use only the first N windows of the text.")
    ] = 8,
    table: Annotated[bool, typer.Option("--table", help="Print the table only; generate no text.")] = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The text to continue.", show_default=_PROMPT)
    ] = None,
    threads: ThreadsOption = None,
    memory: MemoryOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Compress the example model with the paper's grids, measure it, and generate text from coded weights.

    The table is Table I of the EntroLLM paper. It stores the same integers twice, at fixed width and entropy-coded, so
    that only the size differs. All files go to a temporary folder. Run this in a clone of the project, or name another
    model and text.
    """
    from entrollm.engine.load import load
    from entrollm.system import scratch_folder

    if table and prompt is not None:
        raise ValueError("--prompt cannot be given with --table, which generates no text")
    for path, option in ((model, "--model"), (text, "--text")):
        if not path.exists():
            raise ValueError(f"{path} is missing; run this in a clone of the project, or name another with {option}")
    with scratch_folder("entrollm-demo-") as folder:
        results = {}
        for label, bits, prefer in _VARIANTS:
            results[label] = _compress(model, folder / label.replace(" ", ""), bits, prefer, threads, json_output)
        loader = partial(load, threads=threads, memory=read_memory(memory))
        evaluations, original = _evaluate(model, results, (text, windows), loader, json_output)
        rows = _rows(model, results, evaluations, original)
        generated = None
        if not table:
            coded = loader(results["uint8 + Huffman"].path)
            generated = _generate(coded, _PROMPT if prompt is None else prompt, json_output, rows)
        if json_output:
            print_json(json_safe(_to_json(rows, results, generated)))
        elif table:
            _print_table(rows)


def _compress(model: Path, out: Path, bits: int, prefer: Prefer, threads: int | None, quiet: bool) -> CompressResult:
    from entrollm.recipes import CompressOptions, compress

    options = CompressOptions(bits=bits, prefer=prefer, threads=threads)
    with ProgressBars(quiet, compressing=f"compressing to {out.name}") as progress:
        return compress(model, out, options, progress=progress)


def _evaluate(
    model: Path,
    results: dict[str, CompressResult],
    text: tuple[Path, int],
    loader: Callable[[Path], Model],
    quiet: bool,
) -> tuple[dict[str, Evaluation], Evaluation]:
    """Measure each grid once, from its entropy-coded folder; the fixed-width folder holds the same integers.

    Args:
        model: the original.
        results: the compressed folders by label.
        text: a file, and how many windows of it are read.
        loader: loads a folder.
        quiet: show no progress.
    """
    from entrollm.engine.files import why_no_tokenizer
    from entrollm.evaluate import DEFAULT_WINDOW, Protocol, cut_windows, evaluate, read_text

    file, count = text
    reference = loader(model)
    if reference.tokenizer is None:
        raise ValueError(why_no_tokenizer(model, "reading a text"))
    window = min(DEFAULT_WINDOW, reference.config.context_length)
    cut = cut_windows(reference.tokenizer, read_text(file), Protocol(window, count, None))
    labels = [label for label, _, prefer in _VARIANTS if prefer != "fixed"]
    loaded = [loader(results[label].path) for label in labels]
    with progress_bar(f"reading {file.name}", "tokens", quiet=quiet) as update:
        evaluations, original = evaluate(loaded, cut, reference, update)
    assert original is not None
    by_label = dict(zip(labels, evaluations, strict=True))
    return {label: by_label[f"uint{bits} + Huffman"] for label, bits, _ in _VARIANTS}, original


def _rows(
    model: Path, results: dict[str, CompressResult], evaluations: dict[str, Evaluation], original: Evaluation
) -> list[QualityRow]:
    from entrollm.report import QualityRow

    first = next(iter(results.values()))
    base = QualityRow(
        label="original",
        size_bytes=first.source_bytes,
        bits_per_weight=first.source_bytes * 8 / first.weights,
        perplexity=original.perplexity.perplexity,
    )
    rows = [base]
    for label, result in results.items():
        evaluation = evaluations[label]
        assert evaluation.divergence is not None
        rows.append(
            replace(
                base,
                label=label,
                size_bytes=result.file_bytes,
                bits_per_weight=result.file_bits,
                entropy_bits=result.entropy_bits,
                perplexity=evaluation.perplexity.perplexity,
                kl_nats=evaluation.divergence.mean,
                top1_agreement=evaluation.divergence.top1_agreement,
            )
        )
    return rows


def _generate(model: Model, prompt: str, quiet: bool, rows: list[QualityRow]) -> dict[str, Any]:
    """Print the table and continue the prompt from the 8-bit coded model, as the text is made."""
    if not quiet:
        _print_table(rows)
        stdout.print("\nfrom the uint8 + Huffman folder:")
        stdout.print(f"[bold]{escape(prompt)}[/bold]", end="")
    result = model.generate(
        prompt,
        max_tokens=64,
        temperature=0.7,
        top_p=0.9,
        seed=1,
        on_text=None if quiet else lambda piece: stdout.print(piece, end="", markup=False, soft_wrap=True),
    )
    if not quiet:
        stdout.print("\n")
        stdout.print("next: [cyan]entrollm compress MODEL -o OUT[/cyan], then [cyan]entrollm run OUT -p TEXT[/cyan]")
    return {"prompt": prompt, "text": result.text}


def _print_table(rows: list[QualityRow]) -> None:
    from entrollm.report import quality_table

    stdout.print(quality_table("EntroLLM Table I, measured", rows).to_rich())
    by_label = {row.label: row for row in rows}
    for bits in (8, 4):
        fixed, coded = by_label[f"uint{bits}"].size_bytes, by_label[f"uint{bits} + Huffman"].size_bytes
        assert fixed and coded
        stdout.print(f"uint{bits}: entropy coding saves [bold]{100 * (1 - coded / fixed):.1f} %[/bold]")


def _to_json(
    rows: list[QualityRow], results: dict[str, CompressResult], generated: dict[str, Any] | None
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "rows": [asdict(row) for row in rows],
        "compress": {label: result.to_json() for label, result in results.items()},
        "generated": generated,
    }
