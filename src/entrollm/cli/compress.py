"""`entrollm compress`: a checkpoint to a coded model folder."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entrollm.cli.console import JsonOption, ThreadsOption, print_json, progress_bar, stdout, warn
from entrollm.cli.targets import BpwOption, FitOption, parse_target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from entrollm.arrays import Device
    from entrollm.calibrate import CalibrationText, StoredStatistics, Tuner
    from entrollm.compress import CompressOptions, CompressResult, PostFit
    from entrollm.compress.result import ImportedSummary

# Windows that --max-kl and --tune measure on.
_HELD_OUT_WINDOWS = 16

EXAMPLES = (
    ("entrollm compress MODEL -o OUT", "4-bit grids, coded for size"),
    ("entrollm compress MODEL -o OUT --bits 8", "nearly lossless"),
    ("entrollm compress MODEL -o OUT --bpw 3.5", "3.5 bits per weight, everything included"),
    ("entrollm compress MODEL -o OUT --fit 1.9GB", "the best model of at most this size"),
    ("entrollm compress MODEL -o OUT --bpw 3 --calibration text.txt", "calibrated"),
    ("entrollm compress MODEL -o OUT --bpw 3 --calibration self", "calibrated on what the model writes"),
    ("entrollm compress MODEL -o OUT --bpw 2.5 --calibration text.txt --tune", "closer still, at low sizes"),
    ("entrollm compress MODEL -o OUT --bpw 3 --calibration text.txt --device cuda", "on a GPU"),
    ("entrollm compress MODEL -o OUT --max-kl 0.02 --calibration text.txt", "the smallest that stays this close"),
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


class Method(StrEnum):
    """What calibrated matrices are quantized by."""

    feedback = "feedback"
    gptq = "gptq"


class Prefer(StrEnum):
    """What decides between codes."""

    size = "size"
    speed = "speed"
    fixed = "fixed"


class DeviceName(StrEnum):
    """What calibrates and quantizes."""

    cpu = "cpu"
    cuda = "cuda"


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
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE|self",
            help="With --bpw, --fit or --max-kl: a UTF-8 text like what the model will read; it steers the "
            "rounding; self for none but what the model writes itself.",
        ),
    ] = None,
    sampled: Annotated[
        int | None,
        typer.Option(
            "--sampled",
            min=0,
            metavar="N",
            help="With --calibration: windows that the model writes itself, beside the text; by default 64. They "
            "take the whole model in memory, in float32; 0 takes one layer.",
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option("--method", help="What a calibrated matrix is quantized by; gptq is there to compare with."),
    ] = Method.feedback,
    drift: Annotated[
        bool,
        typer.Option(
            help="With --calibration: let each matrix make up for what those before it have become, which costs a "
            "walk of the text through both models.",
        ),
    ] = True,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            metavar="X",
            help="With --calibration: the smallest files whose mean KL divergence from the original is at most X nats, "
            "measured on windows of the text that calibration does not see.",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="With --calibration: then fit the scales to the original's predictions; integers stay. "
            "Worth its minutes at 3 bits and below.",
        ),
    ] = False,
    device_name: Annotated[
        DeviceName,
        typer.Option("--device", help="With --calibration: what calibrates and quantizes; cuda for a GPU, with torch."),
    ] = DeviceName.cpu,
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
    from entrollm.calibrate import Tuner, held_out
    from entrollm.compress import CompressOptions, check_output
    from entrollm.quantize.select import parse_bits

    target = parse_target(bpw, fit, bits)
    default_bits, overrides = parse_bits(bits or [], keep or [])
    options = CompressOptions(
        bits=default_bits,
        target=target,
        method=method.value,
        drift=drift,
        fine_scales=tune,
        granularity=granularity.value,
        overrides=overrides,
        prefer=prefer.value,
        processor=processor.value,
        tokenizer=tokenizer,
        threads=threads,
    )
    text = _calibration_text(calibration, sampled, max_kl is not None or tune)
    if tune and text is None:
        raise ValueError("--tune needs a text: add --calibration FILE or --calibration self")
    if text is None and device_name is not DeviceName.cpu:
        raise ValueError(f"--device {device_name.value} goes with --calibration FILE or --calibration self")
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise ValueError(f"--max-kl must be above 0 and finite, found {max_kl}")
    check_output(out, overwrite)
    _warn_of_engine(model)
    device = _open_device(device_name)
    if max_kl is not None:
        if target is not None or bits or text is None:
            raise ValueError("--max-kl goes with --calibration, and without --bits, --bpw and --fit")
        _compress_within(model, out, options, (max_kl, text, tune, device), overwrite, json_output)
        return
    if text is not None and target is None:
        raise ValueError("--calibration needs a size: add --bpw 3.5, --fit 1.9GB or --max-kl 0.02")
    with tempfile.TemporaryDirectory(prefix="entrollm-calibration-") as folder, device.guard():
        statistics = None if text is None else _calibrate(model, text, Path(folder), device, json_output)
        tuner = None
        if text is not None and statistics is not None and tune:
            tuner = Tuner(model, statistics.windows, held_out(model, text, device), threads)
        result = _compress(model, out, options, (statistics, tuner), overwrite, json_output)
    if json_output:
        print_json(result.to_json() | _tuning(tuner, result))
    else:
        _print_summary(result)
        _print_tuning(tuner, result)


def _warn_of_engine(model: str) -> None:
    """Say before the work begins if `entrollm run` will not load the result."""
    from entrollm.checkpoint.resolve import resolve
    from entrollm.engine.check import why_not_run

    if reason := why_not_run(resolve(model)):
        warn(f"entrollm run will not load the result: {reason}; transformers may, through entrollm.hf")


def _compress(
    model: str,
    out: Path,
    options: CompressOptions,
    calibrated: tuple[StoredStatistics | None, Tuner | None],
    overwrite: bool,
    quiet: bool,
) -> CompressResult:
    from entrollm.compress import compress
    from entrollm.compress.progress import CompressProgress

    statistics, tuner = calibrated
    with ExitStack() as shown:
        update = shown.enter_context(progress_bar("compressing", "weights", quiet=quiet))

        def show(progress: CompressProgress) -> None:
            update(progress.weights_done, progress.weights)

        # One bar at a time.
        post_fit = None if tuner is None else _with_bar(tuner, quiet, shown.close)
        return compress(
            model, out, options, statistics=statistics, post_fit=post_fit, overwrite=overwrite, on_progress=show
        )


def _compress_within(
    model: str,
    out: Path,
    options: CompressOptions,
    limit: tuple[float, CalibrationText, bool, Device],
    overwrite: bool,
    quiet: bool,
) -> None:
    from entrollm.calibrate import Tuner, held_out
    from entrollm.evaluate import DivergenceLimit, Trial, compress_within

    def show(trial: Trial) -> None:
        if not quiet:
            stdout.print(f"{trial.file_bits:.3f} bits/weight: KL {trial.divergence.mean:.4g}")

    max_kl, text, tune, device = limit
    with tempfile.TemporaryDirectory(prefix="entrollm-calibration-") as folder, device.guard():
        windows = held_out(model, text, device)
        statistics = _calibrate(model, text, Path(folder), device, quiet)
        tuner = Tuner(model, statistics.windows, windows, options.threads) if tune else None
        result = compress_within(
            model,
            out,
            options,
            DivergenceLimit(max_kl, windows),
            statistics=statistics,
            post_fit=None if tuner is None else _with_bar(tuner, quiet),
            overwrite=overwrite,
            on_trial=show,
        )
    if quiet:
        print_json(result.to_json() | _tuning(tuner, result.compressed))
        return
    _print_summary(result.compressed)
    _print_tuning(tuner, result.compressed)
    kl = result.divergence
    stdout.print(
        f"KL divergence from the original: mean [bold]{kl.mean:.4g}[/bold] of {max_kl:g} nats, 99th percentile "
        f"{kl.percentile_99:.3g}, on {result.predictions:,} predictions that calibration did not see"
    )


def _with_bar(tuner: Tuner, quiet: bool, before: Callable[[], None] = lambda: None) -> PostFit:
    """A tuner that shows how far it is."""

    def post_fit(folder: Path) -> dict[str, NDArray[Any]]:
        before()
        with progress_bar("tuning", "windows", quiet=quiet) as update:
            return tuner(folder, update)

    return post_fit


def _tuning(tuner: Tuner | None, result: CompressResult) -> dict[str, Any]:
    if tuner is None or tuner.result is None:
        return {}
    return {"tuning": {**tuner.result.to_json(), "is_kept": result.is_refitted}}


def _print_tuning(tuner: Tuner | None, result: CompressResult) -> None:
    if tuner is None or tuner.result is None:
        return
    tuned = tuner.result
    verdict = f"tuned: KL divergence {tuned.kl_before:.4g} -> [bold]{tuned.kl_after:.4g}[/bold] nats"
    if not tuned.is_kept:
        verdict = f"tuning did not help (KL divergence {tuned.kl_before:.4g} nats): the scales stay as they were"
    elif not result.is_refitted:
        verdict = (
            f"tuned scales would take more than the asked size: they stay as they were (KL divergence "
            f"{tuned.kl_before:.4g} nats, {tuned.kl_after:.4g} if tuned)"
        )
    stdout.print(
        f"{verdict}, on {tuned.predictions:,} predictions that neither calibration nor tuning saw; "
        f"{tuned.elapsed_s:.1f} s"
    )


def _calibration_text(calibration: str | None, sampled: int | None, measures: bool) -> CalibrationText | None:
    from entrollm.calibrate import DEFAULT_WINDOWS, CalibrationText

    if calibration is None:
        if sampled is not None:
            raise ValueError("--sampled goes with --calibration FILE or --calibration self")
        return None
    return CalibrationText(
        None if calibration == "self" else calibration,
        sampled=DEFAULT_WINDOWS if sampled is None else sampled,
        held_out=_HELD_OUT_WINDOWS if measures else 0,
    )


def _open_device(name: DeviceName) -> Device:
    if name is DeviceName.cpu:
        from entrollm.arrays import HOST

        return HOST
    try:
        from entrollm.torch.device import TorchDevice
    except ImportError as error:
        raise ValueError(f"--device {name.value}: {error}") from None
    return TorchDevice(name.value)


def _calibrate(model: str, text: CalibrationText, folder: Path, device: Device, quiet: bool) -> StoredStatistics:
    from entrollm.calibrate import calibrate

    with progress_bar("calibrating", "windows and layers", quiet=quiet) as update:
        return calibrate(model, text, folder, progress=lambda action, done, total: update(done, total), device=device)


def _remark(packed: ImportedSummary) -> str:
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
    if result.imported is not None:
        packed = result.imported
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
