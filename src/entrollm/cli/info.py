"""`entrollm info`: what this installation runs on, and what a compressed model takes here."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrollm.cli.console import JsonOption, ThreadsOption, print_json, progress_bar, stdout
from entrollm.cli.token_bytes import describe_token_bytes, read_token_bytes, token_bytes_to_json

if TYPE_CHECKING:
    from entrollm.engine.memory_report import MatrixForms, MemoryReport
    from entrollm.report import Table

EXAMPLES = (
    ("entrollm info", "version, processor, instruction set and its speed"),
    ("entrollm info OUT", "what each choice of --memory takes here"),
)


def command(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="A folder made by `entrollm compress`.", show_default=False),
    ] = None,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the version, the processor, and the instruction set that the kernels use with its speed.

    The environment variable ENTROLLM_ISA forces another one of those listed: ENTROLLM_ISA=scalar entrollm run ...

    With a folder, show instead what its matrices take in memory for each choice of --memory, and in which form each
    of them is multiplied: all are transcoded once, which takes about a second for a billion weights.
    """
    if model is None:
        _show_installation(threads, json_output)
    else:
        _show_model(model, threads, json_output)


def _show_installation(threads: int | None, json_output: bool) -> None:
    from entrollm import _core
    from entrollm.engine.measure import product_speed
    from entrollm.format.spec import FORMAT_VERSION
    from entrollm.report import format_rate
    from entrollm.threads import default_threads

    threads = threads or default_threads()
    speed = product_speed(threads)
    facts: dict[str, Any] = {
        "version": importlib.metadata.version("entrollm"),
        "format_version": FORMAT_VERSION,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": _core.isa(),
        "isas": dict(_core.isas()),
        "threads": threads,
        "product": asdict(speed),
    }
    if json_output:
        print_json(facts)
        return
    facts["isas"] = ", ".join(name if runs else f"{name} (not on this processor)" for name, runs in _core.isas())
    facts["product"] = (
        f"{format_rate(speed.weights_per_s, 1, 'weights')} decoded and multiplied from cache, "
        f"Gaussian weights on a 4-bit grid stored in {speed.coded_bits:.2f} bits"
    )
    for key, value in facts.items():
        stdout.print(f"{key.replace('_', ' '):15} [bold]{value}[/bold]")


def _show_model(model: Path, threads: int | None, json_output: bool) -> None:
    from entrollm.engine.memory_report import report_memory
    from entrollm.format.reader import CompressedModel
    from entrollm.threads import start_pool

    with (
        CompressedModel.open(model, check=False) as opened,
        progress_bar("transcoding", "weights", quiet=json_output) as update,
    ):
        report = report_memory(opened, start_pool(threads), update)
        sizes = {name: opened.tensor_bytes(name) for name in (*opened.specs, *opened.plain)}
        read = read_token_bytes(opened.config, sizes)
    if json_output:
        print_json(_to_json(report) | {"token": token_bytes_to_json(read)})
        return
    stdout.print(_table(str(model), report).to_rich())
    _print_choices(report)
    if read is not None:
        stdout.print(f"a token reads {describe_token_bytes(read)}")


def _table(title: str, report: MemoryReport) -> Table:
    from entrollm.compress.describe import describe_code
    from entrollm.report import Column, Table

    columns = (
        Column("tensor", "left"),
        Column("in the file", "left"),
        Column("bits"),
        Column("flat", "left"),
        Column("bits"),
        Column("auto", "left"),
    )
    rows = [
        (
            matrix.name,
            describe_code(matrix.code, matrix.flat_rows),
            f"{matrix.file_bytes * 8 / matrix.weights:.2f}",
            " + ".join(f"{bits}" for bits in matrix.flat_rows) or "group scales",
            "" if matrix.flat_bytes is None else f"{matrix.flat_bytes * 8 / matrix.weights:.2f}",
            "flat" if matrix.is_flat else "file",
        )
        for matrix in report.matrices
    ]
    return Table(title, columns, tuple(rows))


def _print_choices(report: MemoryReport) -> None:
    from entrollm.report import format_bytes

    for memory in ("file", "fast", "auto"):
        own, file = report.memory_bytes(memory)
        stdout.print(
            f"--memory {memory:5} [bold]{format_bytes(own)}[/bold] of memory and {format_bytes(file)} of the file, "
            "which the system can drop and read again"
        )
    flat = sum(matrix.is_flat for matrix in report.matrices)
    available = "unknown" if report.available_bytes is None else format_bytes(report.available_bytes)
    stdout.print(
        f"auto: {flat} of {len(report.matrices)} matrices flat; instruction set {report.isa}, "
        f"available memory {available}"
    )


def _to_json(report: MemoryReport) -> dict[str, Any]:
    choices = {memory: report.memory_bytes(memory) for memory in ("file", "fast", "auto")}
    return {
        "isa": report.isa,
        "available_bytes": report.available_bytes,
        "memory": {name: {"own_bytes": own, "file_bytes": file} for name, (own, file) in choices.items()},
        "matrices": [_matrix_to_json(matrix) for matrix in report.matrices],
    }


def _matrix_to_json(matrix: MatrixForms) -> dict[str, Any]:
    from entrollm.compress.describe import describe_code

    return {
        "name": matrix.name,
        "weights": matrix.weights,
        "code": describe_code(matrix.code, matrix.flat_rows),
        "file_bytes": matrix.file_bytes,
        "flat_bytes": matrix.flat_bytes,
        "flat_rows": {str(bits): rows for bits, rows in matrix.flat_rows.items()},
        "auto": "flat" if matrix.is_flat else "file",
    }
