"""`entrollm inspect`: show what a compressed folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrollm.cli.console import JsonOption, ThreadsOption, print_json, progress_bar, stdout

if TYPE_CHECKING:
    from entrollm.compress.describe import ModelReport
    from entrollm.report import Table

EXAMPLES = (
    ("entrollm inspect OUT", "a table of all tensors"),
    ("entrollm inspect OUT --json", "the same for scripts"),
)


def command(
    model: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder made by `entrollm compress`.", show_default=False)
    ],
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show each tensor's grid, entropy, Huffman bits, file bits and error.

    All bits are per weight. The error is the RMS of the quantization error over the RMS of the original weights. The
    last line counts everything: streams, scales, headers, and the tensors that keep their type.
    """
    from entrollm.compress.describe import describe
    from entrollm.format.reader import CompressedModel
    from entrollm.threads import start_pool

    with (
        CompressedModel.open(model, check=False) as opened,
        progress_bar("decoding", "weights", quiet=json_output) as update,
    ):
        report = describe(opened, start_pool(threads), update)
    if json_output:
        print_json(report.to_json())
        return
    stdout.print(_table(str(model), report).to_rich())
    _print_totals(report)


def _table(title: str, report: ModelReport) -> Table:
    from entrollm.report import Column, Table

    columns = (
        Column("tensor", "left"),
        Column("shape"),
        Column("grid", "left"),
        Column("code", "left"),
        Column("symbols"),
        Column("entropy"),
        Column("Huffman"),
        Column("file bits"),
        Column("error"),
    )
    rows = [
        (
            tensor.name,
            f"{tensor.shape[0]} x {tensor.shape[1]}",
            tensor.grid,
            tensor.code,
            str(tensor.symbols),
            f"{tensor.entropy_bits:.3f}",
            f"{tensor.huffman_bits:.3f}",
            f"{tensor.file_bits:.3f}",
            f"{tensor.relative_error:.4f}",
        )
        for tensor in report.tensors
    ]
    return Table(title, columns, tuple(rows))


def _print_totals(report: ModelReport) -> None:
    from entrollm.report import format_bytes, format_count

    stdout.print(
        f"{len(report.tensors)} coded matrices, {format_count(report.coded_weights)} weights: "
        f"entropy {report.entropy_bits:.3f}, Huffman {report.huffman_bits:.3f}, in the file "
        f"[bold]{report.coded_bits:.3f}[/bold] bits (+{100 * _excess(report):.2f} % over Huffman)"
    )
    stdout.print(f"{len(report.kept)} tensors in their own type: {format_bytes(report.kept_bytes)}")
    stdout.print(
        f"weight files: {format_bytes(report.file_bytes)}, [bold]{report.file_bits:.3f}[/bold] bits per weight, "
        "everything included"
    )


def _excess(report: ModelReport) -> float:
    return report.coded_bits / report.huffman_bits - 1 if report.huffman_bits else 0.0
