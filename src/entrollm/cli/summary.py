"""What `entrollm compress` prints about its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from entrollm.cli.console import stdout
from entrollm.report.numbers import format_bytes, format_count, format_rate

if TYPE_CHECKING:
    from entrollm.compress.result import ImportedSummary
    from entrollm.recipes.result import CompressResult

# A source that keeps this share of its bits, or more, was nearly incompressible.
_NEARLY_ALL = 0.9


def print_summary(result: CompressResult) -> None:
    """Print sizes, speed, and what tuning and the search for --max-kl found."""
    done = result.quantized_weights - result.resumed_weights
    stdout.print(
        f"[bold]{escape(str(result.path))}[/bold]: {format_bytes(result.source_bytes)} -> "
        f"[bold green]{format_bytes(result.file_bytes)}[/bold green], "
        f"{result.file_bits:.3f} bits/weight over {format_count(result.weights)} weights"
    )
    if result.quantized_weights:
        stdout.print(
            f"coded weights: entropy {result.entropy_bits:.3f}, Huffman optimum {result.huffman_bits:.3f}, "
            f"in the file {result.coded_bits:.3f} bits"
        )
    else:
        stdout.print("no matrix is coded: all tensors keep their types")
    if result.imported is not None:
        _print_imported(result.imported)
    resumed = f" ({format_count(result.resumed_weights)} were finished before)" if result.resumed_weights else ""
    stdout.print(
        f"{result.elapsed_s:.1f} s, {format_rate(done, result.elapsed_s, 'weights')}, "
        f"read {format_rate(result.source_bytes, result.elapsed_s)}, "
        f"written {format_rate(result.file_bytes, result.elapsed_s)}{resumed}"
    )
    _print_tuning(result)
    _print_divergence(result)
    _print_closeness(result)


def _print_imported(imported: ImportedSummary) -> None:
    remark = ""
    if imported.stored_bits >= _NEARLY_ALL * imported.source_bits:
        remark = ": its grids use nearly all of their integers, so little can be removed"
    stdout.print(
        f"{imported.format}: {format_count(imported.weights)} weights keep their integers; source "
        f"{imported.source_bits:.3f} bits/weight, stored {imported.stored_bits:.3f}; the integers' entropy is "
        f"{imported.entropy_bits:.3f}{remark}"
    )


def _print_tuning(result: CompressResult) -> None:
    tuned = result.tuning
    if tuned is None:
        return
    before, after = f"{tuned.kl_before:.4g}", f"{tuned.kl_after:.4g}"
    verdict = f"tuned: KL divergence {before} -> [bold]{after}[/bold] nats"
    if not tuned.is_kept:
        verdict = f"tuning did not help (KL divergence {before} nats): the scales stay as they were"
    elif not result.is_refitted:
        verdict = (
            f"tuned scales would take more than the requested size: they stay as they were (KL divergence {before} "
            f"nats, {after} if tuned)"
        )
    stdout.print(
        f"{verdict}, on {tuned.predictions:,} predictions that neither calibration nor tuning saw; "
        f"{tuned.elapsed_s:.1f} s"
    )


def _print_divergence(result: CompressResult) -> None:
    if result.search is None:
        return
    divergence = result.search.divergence
    stdout.print(
        f"KL divergence from the original: mean [bold]{divergence.mean:.4g}[/bold] of {result.search.max_kl:g} nats, "
        f"99th percentile {divergence.percentile_99:.3g}, on {result.search.predictions:,} predictions that "
        "calibration did not see"
    )


def _print_closeness(result: CompressResult) -> None:
    close = result.closeness
    if close is None:
        return
    stdout.print(
        f"KL divergence from the original: [bold]{close.kl:.3g}[/bold] nats, same likeliest token at "
        f"[bold]{100 * close.top1_agreement:.0f} %[/bold], perplexity {close.original_perplexity:.4g} -> "
        f"{close.perplexity:.4g}, on {close.predictions} predictions of a short text ({close.elapsed_s:.1f} s)"
    )
