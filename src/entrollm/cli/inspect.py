"""`entrollm inspect`: show what a compressed folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrollm.cli.console import JsonOption, ThreadsOption, print_json, progress_bar, stdout
from entrollm.cli.token_bytes import describe_token_bytes, read_token_bytes, token_bytes_to_json

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
        sizes = {name: opened.tensor_bytes(name) for name in (*opened.specs, *opened.plain)}
        read = read_token_bytes(opened.config, sizes)
    if json_output:
        print_json(report.to_json() | {"token": token_bytes_to_json(read)})
        return
    stdout.print(tensor_table(str(model), report).to_rich())
    for name, value in totals(report):
        stdout.print(f"{name}: {value}")
    if read is not None:
        stdout.print(f"a token reads: {describe_token_bytes(read)}")


def tensor_table(title: str, report: ModelReport) -> Table:
    """One row for each coded matrix."""
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


def totals(report: ModelReport) -> list[tuple[str, str]]:
    """What all matrices, all other tensors and the files take, each with its name."""
    from entrollm.report import format_bytes, format_count

    excess = report.coded_bits / report.huffman_bits - 1 if report.huffman_bits else 0.0
    return [
        (
            f"{len(report.tensors)} coded matrices",
            f"{format_count(report.coded_weights)} weights: entropy {report.entropy_bits:.3f}, Huffman "
            f"{report.huffman_bits:.3f}, in the file {report.coded_bits:.3f} bits (+{100 * excess:.2f} % over Huffman)",
        ),
        (f"{len(report.kept)} tensors in their own type", format_bytes(report.kept_bytes)),
        (
            "weight files",
            f"{format_bytes(report.file_bytes)}, {report.file_bits:.3f} bits per weight, everything included",
        ),
    ]
