"""The two entries to the recipes; what does the work is imported when they are called."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from entrollm.errors import Message, Option, OptionError, Placeholder
from entrollm.processes import ALONE, Group
from entrollm.recipes.options import SELF, CompressOptions
from entrollm.recipes.progress import Progress, Silent, report_weights

if TYPE_CHECKING:
    from entrollm.compress.predict import SizePlan
    from entrollm.compress.result import FolderResult
    from entrollm.recipes.result import CompressResult


def compress(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    group: Group = ALONE,
) -> CompressResult:
    """Quantize a checkpoint, entropy-code it and write a model folder.

    Without calibration, memory stays below twice the largest tensor in float32. The folder appears only when it is
    complete. After an interruption, the same call resumes compressing where it stopped; calibration starts again.
    At the end, the engine compares the model with its original on a short text, if it runs the model.

    Args:
        model: a checkpoint folder, a Hub id or a .gguf file.
        out: the folder to make.
        options: by default 4.5 bits per weight without calibration, or the integers of a quantized checkpoint.
        overwrite: replace an earlier output.
        progress: receives what is finished.
        group: processes that share the calibration, such as an open `entrollm.torch.group.TorchGroup`; this is the
            first, and the others call `entrollm.recipes.assist`. After an error all of them must end.
    Raises:
        FormatError: the checkpoint is malformed or has a weight that is not finite.
        UnsupportedError: the checkpoint uses something that is not implemented.
        EntroLLMError: the calibration text is too short, or activations are not finite.
        ValueError: an option or a path is wrong, or the size is out of reach.
        OSError: reading or writing failed; finished shards are kept for the next run.
    """
    options = CompressOptions() if options is None else options
    _check_options(options)
    progress = progress or Silent()
    result = _compress(model, Path(out), options, overwrite, progress, group)
    if options.base is not None:
        return result  # which is no model by itself
    from entrollm.recipes.closeness import with_closeness

    return with_closeness(model, result, options, progress)


def assist(model: str | Path, options: CompressOptions, group: Group) -> None:
    """Calibrate with the process that calls `compress`, in each of the others.

    Args:
        model, options: what that process calls `compress` with.
        group: the processes.
    Raises:
        EntroLLMError: a process has ended, or this one does not see what the first one writes; also as `compress`.
        ValueError: an option is wrong.
    """
    _check_options(options)
    _calibrated(options, group).assist(model, options, group)


def _calibrated(options: CompressOptions, group: Group) -> ModuleType:
    """The recipe with calibration, which imports torch and transformers."""
    if options.calibration is None:
        raise OptionError(
            Message(
                "{} processes can share a calibration alone: add {} or {}, or start one process",
                group.size,
                Option("calibration", Placeholder("FILE")),
                Option("calibration", SELF),
            )
        )
    try:
        return import_module("entrollm.recipes.calibrated")
    except ModuleNotFoundError as error:
        hint = Message("install torch and transformers with: pip install 'entrollm[hf]'")
        needed = Message("{} needs {}, which is not installed", Option("calibration"), error.name)
        raise OptionError(needed, hint=hint) from None


def _compress(
    model: str | Path, out: Path, options: CompressOptions, overwrite: bool, progress: Progress, group: Group
) -> CompressResult:
    if options.calibration is not None or group.size > 1:
        recipe = _calibrated(options, group)
        result: CompressResult = recipe.compress_calibrated(
            model, out, options, overwrite=overwrite, progress=progress, group=group
        )
        return result
    from entrollm.compress import compress_folder
    from entrollm.recipes.result import CompressResult

    def write(source: str | Path) -> FolderResult:
        report = report_weights(progress)
        return compress_folder(source, out, options.coding(), overwrite=overwrite, on_progress=report)

    if options.base is None:
        return CompressResult.of(write(model))
    from entrollm.compress.difference import compress_difference
    from entrollm.compress.folder import check_output

    check_output(out, overwrite)
    keep = [override.pattern for override in options.coding().overrides]
    return CompressResult.of(compress_difference(model, options.base, out, write, keep))


def _check_options(options: object) -> None:
    if not isinstance(options, CompressOptions):
        raise TypeError(f"options should be CompressOptions(...), found {type(options).__name__}")


def plan(model: str | Path, options: CompressOptions) -> SizePlan:
    """Predict size, error, memory and speed of a model compressed to a size, without writing anything.

    Sizes come from a sample of every matrix and are within about 0.5 % of what `compress` writes without calibration.

    Args:
        model: a checkpoint folder or a Hub id.
        options: with `bpw`, `size` or neither, and without calibration.
    Raises:
        FormatError: the checkpoint is malformed or has a weight that is not finite.
        ValueError: the options have `bits` or calibrate, the size is out of reach, or the checkpoint is quantized
            already.
    """
    _check_options(options)
    if options.base is not None:
        raise OptionError(Message("a plan compares with no base: leave out {}", Option("base", options.base)))
    if options.calibration is not None:
        raise OptionError(Message("a plan does not calibrate: leave out {}", Option("calibration")))
    if options.bits is not None or options.has_widths:
        sizes = Option("bpw", 4.5), Option("size", "1.9GB")
        raise OptionError(Message("a plan is for a size such as {} or {}, not for {}", *sizes, Option("bits")))
    from entrollm.compress import plan as plan_folder

    return plan_folder(model, options.coding())
