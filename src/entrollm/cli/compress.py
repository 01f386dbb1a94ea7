"""`entrollm compress`: a checkpoint to a coded model folder."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrollm.cli.console import JsonOption, ThreadsOption, print_json, progress_bar, stdout
from entrollm.cli.targets import BpwOption, FitOption, parse_target

if TYPE_CHECKING:
    from entrollm.compress import CompressResult
    from entrollm.compress.packed import PackedSummary
    from entrollm.quantize.statistics import Statistics

EXAMPLES = (
    ("entrollm compress MODEL -o OUT", "4-bit grids, coded for size"),
    ("entrollm compress MODEL -o OUT --bits 8", "nearly lossless"),
    ("entrollm compress MODEL -o OUT --bpw 3.5", "3.5 bits per weight, everything included"),
    ("entrollm compress MODEL -o OUT --fit 1.9GB", "the best model of at most this size"),
    ("entrollm compress MODEL -o OUT --bpw 3 --calibration text.txt", "calibrated"),
    ("entrollm compress MODEL -o OUT --prefer speed", "a little larger, faster to decode"),
    ("entrollm compress MODEL -o OUT --prefer speed --target arm", "the same for a board with ARM cores"),
    ("entrollm compress MODEL -o OUT --bits 4 --bits 'model.embed*=8'", "more bits for one tensor"),
    ("entrollm compress MODEL -o OUT --keep 'lm_head*'", "leave a tensor in its type"),
    ("entrollm compress MODEL-GPTQ -o OUT", "keep the integers of a quantized checkpoint"),
    ("entrollm compress MODEL.gguf -o OUT", "and those of a GGUF file"),
)

# A source of which this share or more is left was nearly incompressible.
_LITTLE = 0.9


class Granularity(StrEnum):
    """One grid per tensor, or one per row."""

    tensor = "tensor"
    row = "row"


class Prefer(StrEnum):
    """What decides between codes."""

    size = "size"
    speed = "speed"
    fixed = "fixed"


class Processor(StrEnum):
    """Where the model will run."""

    x86 = "x86"
    arm = "arm"


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a Hub id or a .gguf file.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="The folder to make.", show_default=False)],
    bits: Annotated[
        list[str] | None,
        typer.Option(
            "--bits",
            metavar="N|GLOB=N",
            help="Grid width, 2 to 8 (by default 4); with GLOB= for the tensors that match. The last match wins.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="GLOB", help="Leave the tensors that match in their own type."),
    ] = None,
    bpw: BpwOption = None,
    fit: FitOption = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="With --bpw or --fit: a UTF-8 text like what the model will read; its activations steer the rounding.",
        ),
    ] = None,
    granularity: Annotated[
        Granularity, typer.Option("--granularity", help="One grid per tensor, as in the paper, or one per row.")
    ] = Granularity.tensor,
    prefer: Annotated[
        Prefer,
        typer.Option(
            "--prefer",
            help="The fewest bits, or the fastest decoding within 0.25 bits of them; fixed: no entropy coding.",
        ),
    ] = Prefer.size,
    processor: Annotated[
        Processor, typer.Option("--target", help="The processors that will run it; decides what --prefer speed takes.")
    ] = Processor.x86,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="FOLDER", help="Take the tokenizer from there, as some GGUF files need."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Quantize a checkpoint, entropy-code it and write a model folder.

    Matrices (linear layers, embeddings, output head) are rounded to a uniform grid and coded; norms and biases keep
    their type. With --bpw or --fit the steps of all grids follow from the size, finer where a matrix matters more;
    otherwise the grids are the EntroLLM paper's, of --bits bits. A checkpoint that is quantized already keeps its
    integers, without loss. The folder appears when it is complete; after an
    interruption, the same command goes on where it stopped.
    """
    from entrollm.compress import CompressOptions, compress
    from entrollm.compress.pipeline import CompressProgress
    from entrollm.quantize.select import parse_bits

    target = parse_target(bpw, fit, bits)
    default_bits, overrides = parse_bits(bits or [], keep or [])
    options = CompressOptions(
        bits=default_bits,
        target=target,
        granularity=granularity.value,
        overrides=overrides,
        prefer=prefer.value,
        processor=processor.value,
        tokenizer=tokenizer,
        threads=threads,
    )
    if calibration is not None and target is None:
        raise ValueError("--calibration needs a size: add --bpw 3.5 or --fit 1.9GB")
    with tempfile.TemporaryDirectory(prefix="entrollm-calibration-") as folder:
        statistics = None if calibration is None else _calibrate(model, calibration, Path(folder), json_output)
        with progress_bar("compressing", "weights", quiet=json_output) as update:

            def show(progress: CompressProgress) -> None:
                update(progress.weights_done, progress.weights)

            result = compress(model, out, options, statistics=statistics, overwrite=overwrite, on_progress=show)
    if json_output:
        print_json(result.to_json())
    else:
        _print_summary(result)


def _calibrate(model: str, text: Path, folder: Path, quiet: bool) -> Statistics:
    from entrollm.calibrate import calibrate

    with progress_bar("calibrating", "layers", quiet=quiet) as update:
        return calibrate(model, text, folder, progress=update)


def _remark(packed: PackedSummary) -> str:
    if packed.stored_bits < _LITTLE * packed.source_bits:
        return ""
    return ": its grids use nearly all of their integers, so little can be removed"


def _print_summary(result: CompressResult) -> None:
    from entrollm.report import format_bytes, format_count, format_rate

    done = result.quantized_weights - result.resumed_weights
    stdout.print(
        f"[bold]{result.path}[/bold]: {format_bytes(result.source_bytes)} -> "
        f"[bold green]{format_bytes(result.file_bytes)}[/bold green], "
        f"{result.file_bits:.3f} bits/weight over {format_count(result.weights)} weights"
    )
    stdout.print(
        f"coded weights: entropy {result.entropy_bits:.3f}, Huffman optimum {result.huffman_bits:.3f}, "
        f"in the file {result.coded_bits:.3f} bits"
    )
    if result.packed is not None:
        packed = result.packed
        stdout.print(
            f"{packed.format}: {format_count(packed.weights)} weights keep their integers; source "
            f"{packed.source_bits:.3f} bits/weight, stored {packed.stored_bits:.3f}; the integers' entropy is "
            f"{packed.entropy_bits:.3f}{_remark(packed)}"
        )
    resumed = f" ({format_count(result.resumed_weights)} were finished before)" if result.resumed_weights else ""
    stdout.print(
        f"{result.elapsed_s:.1f} s, {format_rate(done, result.elapsed_s, 'weights')}, "
        f"read {format_rate(result.source_bytes, result.elapsed_s)}, "
        f"written {format_rate(result.file_bytes, result.elapsed_s)}{resumed}"
    )
