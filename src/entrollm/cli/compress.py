"""`entrollm compress`: a checkpoint to a coded model folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from entrollm.cli.console import JsonOption, ThreadsOption, json_safe, message, print_json, warn
from entrollm.cli.flags import write_flags
from entrollm.cli.options import (
    BpwOption,
    KeepOption,
    LosslessForOption,
    LosslessOption,
    SizeOption,
    TrellisOption,
    parse_bits,
)
from entrollm.cli.processes import shared_by_torchrun
from entrollm.cli.progress import ProgressBars
from entrollm.cli.summary import print_summary

EXAMPLES = (
    ("entrollm compress MODEL -o OUT", "4.5 bits per weight, close to the original"),
    ("entrollm compress MODEL -o OUT --bpw 3.5", "3.5 bits per weight, everything included"),
    ("entrollm compress MODEL -o OUT --fit 1.9GB", "the best model of at most this size"),
    ("entrollm compress MODEL -o OUT --bpw 3 --calibration text.txt", "closer to the original, by a text"),
    ("entrollm compress MODEL -o OUT --bpw 3 --calibration self", "the same without a text"),
    ("entrollm compress MODEL -o OUT --bpw 2.5 --calibration text.txt --tune", "closer still, at low sizes"),
    ("entrollm compress MODEL -o OUT --bpw 3 --calibration text.txt --device cuda", "calibrated on a GPU"),
    (
        "torchrun --nproc-per-node 2 -m entrollm compress MODEL -o OUT --bpw 3 --calibration text.txt --device cuda",
        "on two GPUs",
    ),
    ("entrollm compress MODEL -o OUT --max-kl 0.02 --calibration text.txt", "the smallest that stays this close"),
    ("entrollm compress MODEL -o OUT --bpw 3 --calibration self --trellis", "smaller at equal quality, and slower"),
    ("entrollm compress MODEL -o OUT --bits 8", "the paper's 8-bit grids, nearly lossless"),
    ("entrollm compress MODEL -o OUT --bits 4 --bits 'model.embed*=8'", "its 4-bit grids, 8 bits for one tensor"),
    ("entrollm compress MODEL -o OUT --lossless", "every bit of the original, in two thirds of its size"),
    ("entrollm compress MODEL -o OUT --lossless-for 'lm_head*'", "every bit of one tensor, 4.5 bits for the others"),
    ("entrollm compress MODEL -o OUT --lossless --base BASE", "how a fine-tuned model differs from its base"),
    ("entrollm compress MODEL -o OUT --keep 'lm_head*'", "leave a tensor in its type"),
    ("entrollm compress MODEL -o OUT --prefer speed", "a little larger, faster to decode"),
    ("entrollm compress MODEL -o OUT --prefer speed --target arm", "the same for a board with ARM cores"),
    ("entrollm compress MODEL-GPTQ -o OUT", "keep the integers of a quantized checkpoint"),
    ("entrollm compress MODEL.gguf -o OUT", "and those of a GGUF file"),
)


class Granularity(StrEnum):
    """What has a grid of its own."""

    tensor = "tensor"
    row = "row"


class Method(StrEnum):
    """How calibrated matrices are rounded."""

    feedback = "feedback"
    light = "light"
    gptq = "gptq"


class Prefer(StrEnum):
    """What decides between codes."""

    size = "size"
    speed = "speed"
    fixed = "fixed"


class DeviceName(StrEnum):
    """Where calibration and rounding compute."""

    cpu = "cpu"
    cuda = "cuda"


class Processor(StrEnum):
    """The processors that will run the model."""

    x86 = "x86"
    arm = "arm"
    avx512 = "avx512"


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
            help="The EntroLLM paper's grids, of 2 to 8 bits, to reproduce it: at equal size, --bpw stays far closer "
            "to the original. GLOB=N is for tensors whose names match; the others then have 4 bits. Can be repeated; "
            "the last match wins.",
        ),
    ] = None,
    lossless: LosslessOption = False,
    lossless_for: LosslessForOption = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="With --lossless: store differences to the model that this one was fine-tuned from, where they are "
            "smaller. The folder does not run; entrollm export --base restores the model.",
        ),
    ] = None,
    keep: KeepOption = None,
    bpw: BpwOption = None,
    size: SizeOption = None,
    trellis: TrellisOption = False,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            metavar="X",
            help="Find the smallest files whose predictions stay this close to the original's: a mean KL divergence of "
            "at most X nats per token, such as 0.02. Needs --calibration; measured on windows that it does not see.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="FILE|self",
            help="Steer the rounding by a UTF-8 text like what the model will read, or by self: what the model writes "
            "itself. The same size then comes closer to the original. Does not go with --bits.",
        ),
    ] = None,
    sampled: Annotated[
        int | None,
        typer.Option(
            "--sampled",
            min=0,
            metavar="N",
            help="With --calibration: how many windows of text the model writes itself, 64 by default. Writing takes "
            "the whole model in memory, in float32; with 0, calibration takes one layer at a time, if it can.",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="With --calibration: afterwards fit the scales to the original's predictions. Takes minutes, and is "
            "worth them at 3 bits and below.",
        ),
    ] = False,
    drift: Annotated[
        bool,
        typer.Option(
            help="With --calibration: let each matrix make up for the errors of those before it. The text then runs "
            "through both models, which takes time.",
        ),
    ] = True,
    method: Annotated[
        Method,
        typer.Option(
            "--method",
            help="With --calibration: how matrices are rounded. light is quick; gptq is there to compare.",
        ),
    ] = Method.feedback,
    device: Annotated[
        DeviceName,
        typer.Option(
            "--device",
            help="With --calibration: where to compute. cuda is a GPU, and needs torch. Several GPUs share the work if "
            "torchrun starts this command: see the examples.",
        ),
    ] = DeviceName.cpu,
    granularity: Annotated[
        Granularity,
        typer.Option("--granularity", help="With --bits: one grid per tensor, as in the paper, or one per row."),
    ] = Granularity.tensor,
    prefer: Annotated[
        Prefer,
        typer.Option(
            "--prefer",
            help="size: the fewest bits. speed: the fastest code for the --target, which takes 0.2 to 0.4 bits more. "
            "fixed: no entropy coding, to compare with.",
        ),
    ] = Prefer.size,
    processor: Annotated[
        Processor,
        typer.Option(
            "--target",
            help="What will run the model, for --prefer speed. x86: PCs. arm: boards and phones. avx512: servers with "
            "AVX-512 and more than four cores.",
        ),
    ] = Processor.x86,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="FOLDER",
            help="Take the tokenizer files from this folder; some GGUF files need it.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            help="At the end, measure on a short text how close the model stayed to the original. Takes seconds.",
        ),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    threads: ThreadsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Quantize a checkpoint, entropy-code it and write a model folder.

    Matrices (linear layers, embeddings, output head) are rounded to uniform grids and entropy-coded; norms and biases
    keep their type. --bpw and --fit choose the steps of all grids so that the files have the requested size, finer
    where a matrix matters more; without them, matrices take 4.5 bits per weight. --calibration comes closer to the
    original at the same size. --bits rounds to the EntroLLM paper's grids of fixed width instead. --lossless rounds
    nothing: matrices of bf16, f16 and fp8 keep every bit.

    A checkpoint that is quantized already (GPTQ, AWQ, GGUF and others) keeps its integers, without loss. The folder
    appears when it is complete; after an interruption, run the same command again to resume. The last line says how
    close the model stayed, if entrollm run runs it.
    """
    from entrollm.recipes import CompressOptions, assist, compress
    from entrollm.recipes.closeness import damage_of_result

    with shared_by_torchrun(device.value) as group:
        width, overrides = parse_bits(bits or ())
        options = CompressOptions(
            bits=width,
            bpw=bpw,
            size=size,
            max_kl=max_kl,
            overrides=overrides,
            lossless=lossless,
            lossless_for=lossless_for or (),
            base=base,
            keep=keep or (),
            granularity=granularity.value,
            trellis=trellis,
            prefer=prefer.value,
            processor=processor.value,
            calibration=calibration,
            sampled=sampled,
            method=method.value,
            drift=drift,
            tune=tune,
            device=device.value,
            tokenizer=tokenizer,
            measure=measure,
            threads=threads,
        )
        if group.rank:
            assist(model, options, group)
            return
        is_run = base is None and _warn_of_engine(model)
        with ProgressBars(quiet=json_output) as progress:
            result = compress(model, out, options, overwrite=overwrite, progress=progress, group=group)
    if json_output:
        print_json(json_safe(result.to_json()))
    else:
        print_summary(result)
    if is_run and result.unmeasured is not None:
        message(f"how close the model stayed to its original was not measured: {result.unmeasured}")
    if damage := damage_of_result(result, options):
        warn(damage.write(write_flags))


def _warn_of_engine(model: str) -> bool:
    """Say before the work begins if `entrollm run` will not load the result; returns whether it will."""
    from entrollm.checkpoint.resolve import resolve
    from entrollm.engine.check import why_not_run

    if reason := why_not_run(resolve(model)):
        warn(f"entrollm run will not load the result: {reason}; transformers may, through entrollm.hf")
    return not reason
