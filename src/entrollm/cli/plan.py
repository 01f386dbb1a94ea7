"""`entrollm plan`: predict what a size gives, without writing anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from entrollm.cli.console import JsonOption, ThreadsOption, print_json, stdout, warn
from entrollm.cli.flags import write_flags
from entrollm.cli.options import (
    BpwOption,
    KeepOption,
    LosslessForOption,
    LosslessOption,
    SizeOption,
    TrellisOption,
)
from entrollm.cli.token_bytes import describe_token_bytes, read_token_bytes, token_bytes_to_json

if TYPE_CHECKING:
    from entrollm.compress import SizePlan
    from entrollm.engine.traffic import TokenBytes
    from entrollm.report import Table

EXAMPLES = (
    ("entrollm plan MODEL", "size, error, memory and speed at 4.5 bits per weight"),
    ("entrollm plan MODEL --fit 1.9GB", "what fits: bits and error of every tensor"),
    ("entrollm plan MODEL --bpw 3", "how much error, memory and speed 3 bits per weight give"),
    ("entrollm plan MODEL --bpw 3 --keep 'lm_head*'", "with one tensor in its own type"),
    ("entrollm plan MODEL --lossless", "with every bit of the matrices"),
    ("entrollm plan MODEL --bpw 3 --json", "the same for scripts"),
)


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or a Hub id.", show_default=False)],
    bpw: BpwOption = None,
    size: SizeOption = None,
    trellis: TrellisOption = False,
    lossless: LosslessOption = False,
    lossless_for: LosslessForOption = None,
    keep: KeepOption = None,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Predict size, error per tensor, memory and speed of a model compressed to a size, without writing anything.

    Without --bpw or --fit, the size is that of `entrollm compress`: 4.5 bits per weight of the matrices.

    Sizes come from a sample of every matrix and are within about 0.5 % of what compress writes without calibration.
    Tokens per second count the products with the weights alone, for one sequence, at the speed measured on this
    machine.
    """
    from entrollm.checkpoint.model_folder import Checkpoint
    from entrollm.checkpoint.resolve import resolve
    from entrollm.recipes import CompressOptions, plan
    from entrollm.recipes.closeness import damage_of_plan

    options = CompressOptions(
        bpw=bpw,
        size=size,
        trellis=trellis,
        lossless=lossless,
        lossless_for=lossless_for or (),
        keep=keep or (),
        threads=threads,
    )
    result = plan(model, options)
    sizes = {tensor.name: round(tensor.file_bits * tensor.weights / 8) for tensor in result.tensors}
    with Checkpoint.open(resolve(model)) as checkpoint:
        read = read_token_bytes(checkpoint.config, sizes)
    if json_output:
        print_json(result.to_json() | {"token": token_bytes_to_json(read)})
    else:
        _print(model, result, read)
    if damage := damage_of_plan(result, options):
        warn(damage.write(write_flags))


def _print(model: str, result: SizePlan, read: TokenBytes | None) -> None:
    from entrollm.report import format_bytes

    stdout.print(_table(model, result).to_rich())
    stdout.print(
        f"weight files: [bold]{format_bytes(result.file_bytes)}[/bold], [bold]{result.file_bits:.3f}[/bold] bits per "
        "weight, everything included"
    )
    stdout.print(
        f"memory: at most {format_bytes(result.compress_bytes)} to compress, {format_bytes(result.load_bytes)} loaded"
    )
    if read is not None:
        stdout.print(f"a token reads {describe_token_bytes(read)}")
    stdout.print(f"about {result.tokens_per_s:.0f} tokens/s on this machine")


def _table(model: str, result: SizePlan) -> Table:
    from entrollm.report import Column, Table

    columns = (Column("tensor", "left"), Column("shape"), Column("step"), Column("file bits"), Column("error"))
    rows = [
        (
            tensor.name,
            f"{tensor.shape[0]} x {tensor.shape[1]}",
            f"{tensor.step:.3f}" if tensor.step else "lossless",
            f"{tensor.file_bits:.3f}",
            f"{tensor.relative_error:.4f}",
        )
        for tensor in result.tensors
    ]
    return Table(model, columns, tuple(rows))
