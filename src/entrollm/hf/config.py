"""The quantization_config of transformers: the options of `entrollm compress`, in the form that its folders store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from entrollm.codec.choose import Prefer
from entrollm.codec.cost import Processor
from entrollm.compress.options import DEFAULT_BITS
from entrollm.compress.target import DEFAULT_BPW
from entrollm.errors import FormatError, UnsupportedError
from entrollm.format import layout
from entrollm.format.header import versions_read
from entrollm.format.spec import FORMAT_VERSION, READ_VERSIONS
from entrollm.quantize.paper import Granularity
from entrollm.recipes.options import CompressOptions

Method = Literal["paper", "ecsq", "feedback", "light", "gptq", "imported", "lossless"]
# Where only a size in bytes is asked for, which says nothing before the weights are counted.
_PLANNED_BITS = 8
# Bits of a bfloat16 weight, more than which no device holds of a lossless matrix.
_LOSSLESS_BITS = 16
_FIELDS = frozenset(
    {"quant_method", "version", "method", "bits", "granularity", "bits_per_weight", "file_bytes", "prefer", "processor"}
    | {"overrides", "keep", "lossless_for", "source", "trellis"}
)


@register_quantization_config(layout.QUANT_METHOD)
class EntroConfig(QuantizationConfigMixin):
    """How a model is quantized and coded while it is loaded, or how a stored one was made.

    `CompressOptions` has more options, which need `entrollm compress`. `calibration`, and `max_kl` and the others that
    go with it, run the whole model before the first matrix is coded. Folders with `base` hold differences, with which
    nothing multiplies. `tokenizer`, `measure` and `shard_bytes` are about a folder that is written.

    Args:
        bits: width of the paper's grids, 2 to 8; 4 where only `overrides` has widths.
        bpw: bits per weight of the whole model instead, everything included; by default 4.5, for the coded matrices.
        size: a size of the weights instead, in bytes or as "1.9GB".
        granularity: "tensor" or "row": what has a grid of its own; with `bits` only.
        trellis: let the weights of a row choose between two grids: closer at equal size, with slower products. With
            "size" as `prefer`, and none of `bits`, widths in `overrides`, and `lossless`.
        prefer: "size" for the fewest bits, "speed" for the fastest decoding, "fixed" for no entropy coding.
        processor: what will run the model: "x86", "arm", or "avx512" for servers with many cores; with "speed" as
            `prefer` only.
        overrides: bits by glob over tensor names, or None for tensors that keep their type; a later match wins.
        lossless: code every matrix bit for bit; no size goes with it.
        lossless_for: globs of matrices that are coded bit for bit; they win over `overrides`.
        keep: globs of tensors that keep their type; they win over `overrides` and `lossless_for`.
        threads: that quantize; by default one for each core.
    Raises:
        ValueError: an option is out of range, or options exclude each other.
    """

    def __init__(
        self,
        bits: int | None = None,
        bpw: float | None = None,
        size: str | int | None = None,
        *,
        granularity: Granularity = "tensor",
        trellis: bool = False,
        prefer: Prefer = "size",
        processor: Processor = "x86",
        overrides: Mapping[str, int | None] | None = None,
        lossless: bool = False,
        lossless_for: Sequence[str] = (),
        keep: Sequence[str] = (),
        threads: int | None = None,
    ) -> None:
        options = CompressOptions(
            bits=bits,
            bpw=bpw,
            size=size,
            granularity=granularity,
            trellis=trellis,
            overrides=dict(overrides or {}),
            lossless=lossless,
            lossless_for=[lossless_for] if isinstance(lossless_for, str) else list(lossless_for),
            keep=[keep] if isinstance(keep, str) else list(keep),
            prefer=prefer,
            processor=processor,
            threads=threads,
        )
        self.quant_method: Any = layout.QUANT_METHOD
        # Whether the size is the default one, which suits any model.
        states_size = bits is not None or options.target is not None
        self._is_default = not (states_size or options.has_widths or lossless)
        self.bits = DEFAULT_BITS if options.has_widths and not states_size else bits
        self.bpw = DEFAULT_BPW if self._is_default else bpw
        self.file_bytes = None if options.target is None else options.target.file_bytes
        self.method: Method = "lossless" if lossless else "paper" if self.bits is not None else "ecsq"
        # Where the integers of an imported model come from; nothing can be coded by such a configuration.
        self.source: str | None = None
        self.granularity = options.granularity
        self.trellis = options.trellis
        self.prefer = options.prefer
        self.processor = options.processor
        self.overrides = dict(options.overrides)
        self.lossless_for = list(options.lossless_for)
        self.keep = list(options.keep)
        self.threads = options.threads

    def options(self) -> CompressOptions:
        """The same as options of compression."""
        return CompressOptions(
            bits=self.bits,
            bpw=None if self._is_default else self.bpw,
            size=self.file_bytes,
            granularity=self.granularity,
            trellis=self.trellis,
            overrides=self.overrides,
            lossless=self.method == "lossless",
            lossless_for=self.lossless_for,
            keep=self.keep,
            prefer=self.prefer,
            processor=self.processor,
            threads=self.threads,
        )

    def expected_bits(self) -> float:
        """Bits per weight to plan device memory with."""
        return _LOSSLESS_BITS if self.method == "lossless" else self.bits or self.bpw or _PLANNED_BITS

    def to_dict(self) -> dict[str, Any]:
        """What config.json stores: the form of docs/reference/format.md, options that have their default left out."""
        stored: dict[str, Any] = {
            "quant_method": self.quant_method,
            "version": FORMAT_VERSION,
            "method": self.method,
        }
        if self.method == "imported":
            stored["source"] = self.source
        elif self.bits is not None:
            stored |= {"bits": self.bits, "granularity": self.granularity}
        elif self.method == "lossless":
            pass
        elif self.bpw is not None:
            stored["bits_per_weight"] = self.bpw
        else:
            stored["file_bytes"] = self.file_bytes
        stored["prefer"] = self.prefer
        if self.trellis:
            stored["trellis"] = True
        if self.processor != "x86":
            stored["processor"] = self.processor
        if self.overrides:
            stored["overrides"] = dict(self.overrides)
        if self.lossless_for:
            stored["lossless_for"] = list(self.lossless_for)
        if self.keep:
            stored["keep"] = list(self.keep)
        return stored

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Parse what config.json stores.

        Raises:
            FormatError: a field is unknown or has a value that it cannot have.
            UnsupportedError: the folder has another version of the format.
        """
        if unknown := sorted(config_dict.keys() - _FIELDS):
            raise FormatError(
                f"quantization_config has the unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}"
            )
        version = config_dict.get("version", FORMAT_VERSION)
        if type(version) is not int or version not in READ_VERSIONS:
            raise UnsupportedError(
                f"quantization_config: format version {version!r}; this EntroLLM reads {versions_read()}"
            )
        try:
            config = cls(
                bits=config_dict.get("bits"),
                bpw=config_dict.get("bits_per_weight"),
                size=config_dict.get("file_bytes"),
                granularity=config_dict.get("granularity", "tensor"),
                trellis=config_dict.get("trellis", False),
                prefer=config_dict.get("prefer", "size"),
                # Stored beside another `prefer`, which it does not go with, it had no effect.
                processor=config_dict.get("processor", "x86") if config_dict.get("prefer") == "speed" else "x86",
                overrides=config_dict.get("overrides"),
                lossless=config_dict.get("method") == "lossless",
                lossless_for=config_dict.get("lossless_for", ()),
                keep=config_dict.get("keep", ()),
            )
            config._adopt_method(config_dict.get("method", config.method), config_dict.get("source"))
        except (TypeError, ValueError) as error:
            raise FormatError(f"quantization_config: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EntroConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def _adopt_method(self, method: Any, source: Any) -> None:
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, found {method!r}")
        if (method == "imported") != (source is not None):
            raise ValueError("an imported model has a source, and no other has")
        self.method, self.source = method, source
