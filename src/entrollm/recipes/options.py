"""What a user may ask of compression: one set of names for Python, the command line and transformers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from entrollm.compress.target import DEFAULT_BPW, Target, parse_size
from entrollm.errors import Message, Option, OptionError, Placeholder
from entrollm.threads import MAX_THREADS

if TYPE_CHECKING:
    from entrollm.codec.choose import Prefer
    from entrollm.codec.cost import Processor
    from entrollm.compress.options import CodingOptions, Method
    from entrollm.quantize.paper import Granularity

SELF = "self"
"""The value of `calibration` that stands for text which the model writes itself."""

DeviceName = Literal["cpu", "cuda"]

_SIZES = Option("bits"), Option("bpw"), Option("size")
_NO_PAPER_GRIDS = "{} goes with a size such as {}, and not with {}"
_EITHER_TEXT = Option("calibration", Placeholder("FILE")), Option("calibration", SELF)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOptions:
    """Options of `entrollm.compress` and `entrollm.plan`.

    At most one of `bits`, `bpw`, `size` and `max_kl` decides the size. Without any, the coded matrices take 4.5 bits
    per weight, or keep the integers that the checkpoint already has. `calibration` does not go with `bits`, and
    `sampled`, `drift`, `method`, `tune`, `device` and `seed` say how to calibrate.

    Attributes:
        bits: width of the paper's grids, 2 to 8. They reproduce the paper; at equal size, `bpw` stays closer.
        bpw: bits per weight of the weight files, everything included.
        size: size of the weight files, in bytes or as "1.9GB"; never exceeded.
        max_kl: find the smallest files whose mean KL divergence from the original is at most this many nats per token,
            measured on windows that calibration does not see.
        overrides: grid widths by glob over tensor names, or None for tensors that keep their type; a later match wins.
            Widths go with `bits`, which is then 4 by default, and with none of `bpw`, `size`, `max_kl` and
            `calibration`.
        lossless: code every matrix bit for bit, which leaves nothing to round: no size goes with it.
        lossless_for: globs of matrices that are coded bit for bit; they win over `overrides`.
        base: a checkpoint that the model was fine-tuned from, a folder or a Hub id: with `lossless`, matrices become
            differences to it where these are smaller. The folder does not run; `export` with the same base restores it.
        keep: globs of tensors that keep their type; they win over `overrides` and `lossless_for`.
        granularity: "tensor" or "row": what has a grid of its own; with `bits` only.
        trellis: let the weights of a row choose between two grids, half a step apart: files that are as close to the
            original take 0.13 to 0.2 bits less per weight, and products with them are slower. With "size" as `prefer`,
            and none of `bits`, `lossless` and "gptq".
        prefer: "size" for the fewest bits, "speed" for the fastest decoding, "fixed" for no entropy coding.
        processor: what will run the model: "x86", "arm", or "avx512" for servers with many cores; with "speed" as
            `prefer` only.
        calibration: a UTF-8 text file like what the model will read, or "self" for what the model writes itself.
        sampled: windows of text that the model writes itself, added to a text file; `None` for 64. They take the whole
            model in memory; with 0, calibration takes one layer at a time, if the model allows that.
        seed: of the text that the model writes itself.
        method: how calibrated matrices are rounded: "feedback"; "light", which measures no more than how much matrices
            and their inputs matter, on 16 short windows, and rounds as without calibration; or "gptq" to compare with.
        drift: let each calibrated matrix make up for the errors of those before it.
        tune: afterwards fit the stored scales to the original's predictions.
        device: what calibrates and rounds: "cpu", or "cuda" for a GPU.
        tokenizer: a folder whose tokenizer files replace those of the model.
        measure: afterwards measure how close the model stayed, on a short text; see `Closeness`.
        shard_bytes: source bytes that share an output file; an interrupted run resumes after the last complete one.
        threads: worker threads; `None` for one per core.
    Raises:
        ValueError: a value is out of range, or options exclude each other.
    """

    bits: int | None = None
    bpw: float | None = None
    size: int | str | None = None
    max_kl: float | None = None
    overrides: Mapping[str, int | None] = field(default_factory=dict)
    lossless: bool = False
    lossless_for: Sequence[str] = ()
    base: str | Path | None = None
    keep: Sequence[str] = ()
    granularity: Granularity = "tensor"
    trellis: bool = False
    prefer: Prefer = "size"
    processor: Processor = "x86"
    calibration: str | Path | None = None
    sampled: int | None = None
    seed: int = 0
    method: Method = "feedback"
    drift: bool = True
    tune: bool = False
    device: DeviceName = "cpu"
    tokenizer: str | Path | None = None
    measure: bool = True
    shard_bytes: int = 1 << 30
    threads: int | None = None

    def __post_init__(self) -> None:
        _check_values(self)
        _check_calibration(self)
        _check_size(self)
        _check_trellis(self)

    @property
    def has_widths(self) -> bool:
        """Whether `overrides` gives some tensors a grid of the paper."""
        return any(bits is not None for bits in self.overrides.values())

    @property
    def target(self) -> Target | None:
        """The size to meet; `None` where `bits` or `max_kl` decides it, or nothing does.

        Raises:
            ValueError: the size is not one.
        """
        if self.bpw is not None:
            return Target(bits_per_weight=self.bpw)
        if self.size is not None:
            return Target(file_bytes=parse_size(self.size) if isinstance(self.size, str) else self.size)
        return None

    def coding(self) -> CodingOptions:
        """The part that decides how matrices are quantized and coded.

        Raises:
            ValueError: `overrides` has widths, which would change nothing beside a size or calibration.
        """
        from entrollm.compress.options import ALL_MATRICES, CodingOptions
        from entrollm.quantize.select import BitsOverride

        if self.has_widths and (self.target is not None or self.max_kl is not None):
            raise OptionError(Message("give one of {}, {} and {}; they all decide the size", *_SIZES))
        if self.has_widths and self.calibration is not None:
            raise OptionError(Message(_NO_PAPER_GRIDS, Option("calibration"), Option("bpw", DEFAULT_BPW), _SIZES[0]))
        overrides = [BitsOverride(pattern, bits) for pattern, bits in self.overrides.items()]
        return CodingOptions(
            bits=self.bits,
            target=self.target,
            method=self.method,
            drift=self.drift,
            trellis=self.trellis,
            fine_scales=self.tune,
            granularity=self.granularity,
            overrides=(*overrides, *(BitsOverride(pattern, None) for pattern in self.keep)),
            lossless=(*((ALL_MATRICES,) if self.lossless else ()), *self.lossless_for),
            prefer=self.prefer,
            processor=self.processor,
            shard_bytes=self.shard_bytes,
            tokenizer=None if self.tokenizer is None else Path(self.tokenizer),
            threads=self.threads,
        )


def _check_types(options: CompressOptions) -> None:
    """Check what would otherwise be taken for something else, such as "no" for True."""
    for name in ("lossless", "trellis", "drift", "tune", "measure"):
        if not isinstance(value := getattr(options, name), bool):
            raise OptionError(Message("{} must be True or False, found {!r}", Option(name), value))
    for name in ("keep", "lossless_for"):
        globs = getattr(options, name)
        if isinstance(globs, str):
            raise OptionError(Message("{} is a sequence of globs, found the text {!r}", Option(name), globs))
        if not isinstance(globs, Collection) or not all(isinstance(each, str) for each in globs):
            raise OptionError(Message("{} is a sequence of globs, found {!r}", Option(name), globs))
    if not isinstance(options.overrides, Mapping) or not all(isinstance(each, str) for each in options.overrides):
        raise OptionError(Message("{} maps globs to widths, found {!r}", Option("overrides"), options.overrides))
    for name in ("bpw", "max_kl"):
        number = getattr(options, name)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise OptionError(Message("{} must be an int or a float, found {!r}", Option(name), number))
    if options.size is not None and (isinstance(options.size, bool) or not isinstance(options.size, int | str)):
        words = "{} must be an int, in bytes, or a text such as 1.9GB, found {!r}"
        raise OptionError(Message(words, Option("size"), options.size))


def _check_values(options: CompressOptions) -> None:
    """Check each option by itself."""
    from entrollm.codec.choose import Prefer
    from entrollm.codec.cost import Processor
    from entrollm.compress.options import Method
    from entrollm.quantize.paper import MAX_BITS, MIN_BITS, Granularity

    _check_types(options)
    for bits in (options.bits, *options.overrides.values()):
        if bits is not None and (type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS):
            raise OptionError(Message("{} must be {} to {}, found {!r}", Option("bits"), MIN_BITS, MAX_BITS, bits))
    choices: dict[str, Any] = {
        "granularity": Granularity,
        "prefer": Prefer,
        "processor": Processor,
        "method": Method,
        "device": DeviceName,
    }
    for name, choice in choices.items():
        allowed, value = get_args(choice), getattr(options, name)
        if value not in allowed:
            raise OptionError(Message("{} must be one of {}, found {!r}", Option(name), ", ".join(allowed), value))
    for name, fewest in (("sampled", 0), ("seed", 0), ("shard_bytes", 1), ("threads", 1)):
        count = getattr(options, name)
        if count is not None and (type(count) is not int or count < fewest):
            raise OptionError(
                Message("{} must be at least {}, a whole number, found {!r}", Option(name), fewest, count)
            )
    if options.processor != "x86" and options.prefer != "speed":
        raise OptionError(Message("{} goes with {}", Option("processor", options.processor), Option("prefer", "speed")))
    if options.threads is not None and options.threads > MAX_THREADS:
        raise OptionError(Message("{} must be at most {}, found {}", Option("threads"), MAX_THREADS, options.threads))


def _check_calibration(options: CompressOptions) -> None:
    """Check that what calibrates comes with a text to calibrate on."""
    max_kl = options.max_kl
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise OptionError(Message("{} must be above 0 and finite, found {}", Option("max_kl"), max_kl))
    if options.calibration is not None:
        return
    if options.tune:
        raise OptionError(Message("{} needs a text: add {} or {}", Option("tune"), *_EITHER_TEXT))
    if options.sampled is not None:
        raise OptionError(Message("{} goes with {} or {}", Option("sampled"), *_EITHER_TEXT))
    if options.seed:
        raise OptionError(Message("{} goes with {} or {}", Option("seed", options.seed), *_EITHER_TEXT))
    if options.device != "cpu":
        raise OptionError(Message("{} goes with {} or {}", Option("device", options.device), *_EITHER_TEXT))
    if options.method != "feedback":
        raise OptionError(Message("{} goes with {} or {}", Option("method", options.method), *_EITHER_TEXT))
    if not options.drift:
        raise OptionError(Message("{} goes with {} or {}", Option("drift", False), *_EITHER_TEXT))


def _check_size(options: CompressOptions) -> None:
    """Check that one option at most decides the size, and that calibration has one."""
    given = [value for value in (options.bits, options.bpw, options.size) if value is not None]
    if options.base is not None and not options.lossless:
        raise OptionError(Message("{} goes with {}", Option("base", options.base), Option("lossless")))
    if options.lossless and (given or options.has_widths or options.max_kl is not None or options.calibration):
        words = "{} leaves nothing to round: leave out {}, {}, {}, {} and {}, or name some matrices with {}"
        others = Option("max_kl"), Option("calibration"), Option("lossless_for", [Placeholder("GLOB")])
        raise OptionError(Message(words, Option("lossless"), *_SIZES, *others))
    if options.max_kl is not None:
        if given or options.calibration is None:
            raise OptionError(
                Message("{} goes with {}, and without {}, {} and {}", Option("max_kl"), Option("calibration"), *_SIZES)
            )
        return
    if len(given) > 1:
        raise OptionError(Message("give one of {}, {} and {}; they all decide the size", *_SIZES))
    if options.calibration is not None and options.bits is not None:
        raise OptionError(Message(_NO_PAPER_GRIDS, Option("calibration"), Option("bpw", DEFAULT_BPW), _SIZES[0]))
    if options.granularity != "tensor" and options.bits is None and not options.has_widths:
        raise OptionError(Message("{} goes with {}", Option("granularity", options.granularity), _SIZES[0]))
    _ = options.target  # raises for a size that is not one


def _check_trellis(options: CompressOptions) -> None:
    """Check that matrices are rounded to grids of free steps, and coded for size."""
    if not options.trellis:
        return
    others = [
        Option(name, value)
        for name, value, is_wrong in (
            ("bits", options.bits, options.bits is not None),
            ("overrides", dict(options.overrides), options.has_widths),
            ("lossless", None, options.lossless),
            ("method", options.method, options.method == "gptq"),
            ("prefer", options.prefer, options.prefer != "size"),
        )
        if is_wrong
    ]
    if others:
        words = "{} is for the smallest files at a size such as {}: leave out {}"
        raise OptionError(Message(words, Option("trellis"), Option("bpw", DEFAULT_BPW), others[0]))
