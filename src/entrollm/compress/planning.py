"""What becomes of each tensor of a checkpoint: decided once, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Self

from entrollm.checkpoint.imported import ImportedMatrix
from entrollm.checkpoint.model_folder import Checkpoint
from entrollm.compress.lossless import make_lossless
from entrollm.compress.options import ALL_MATRICES, DEFAULT_BITS, CodingOptions
from entrollm.compress.stacks import split_stacks
from entrollm.compress.target import DEFAULT_TARGET
from entrollm.errors import FormatError, Message, Option, OptionError, Placeholder
from entrollm.quantize.select import BitsOverride, TensorPlan, plan_tensors


@dataclass(frozen=True)
class Plan:
    """What becomes of each tensor of a checkpoint.

    Attributes:
        tensors: all tensors, in the order in which they are coded; stacks are listed as their matrices.
        coded: names of the tensors that become coded matrices, in order.
        imported: the matrices whose integers are taken over, by name.
        shards: names of the tensors of each output file, in order.
    """

    tensors: Mapping[str, TensorPlan]
    coded: tuple[str, ...]
    imported: Mapping[str, ImportedMatrix]
    shards: tuple[tuple[str, ...], ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the tensors that keep their type, in order."""
        coded = frozenset(self.coded)
        return tuple(name for name in self.tensors if name not in coded)

    @property
    def lossless(self) -> frozenset[str]:
        """Names of the matrices that are coded bit for bit."""
        return frozenset(name for name in self.coded if self.tensors[name].is_lossless)

    def coding(self, names: Iterable[str]) -> Self:
        """This plan with only the matrices `names` coded, in one file."""
        return replace(self, coded=tuple(names), shards=(tuple(self.tensors),))


def with_size(checkpoint: Checkpoint, options: CodingOptions) -> CodingOptions:
    """The options with the default size, where they state none and the checkpoint has no integers to keep."""
    states_size = options.bits is not None or options.target is not None
    has_widths = any(override.bits is not None for override in options.overrides)
    if states_size or has_widths or ALL_MATRICES in options.lossless or _imported(checkpoint, options):
        return options
    return replace(options, target=DEFAULT_TARGET)


def make_plan(checkpoint: Checkpoint, options: CodingOptions, order: Sequence[str] = ()) -> Plan:
    """Plan the tensors of a checkpoint.

    A shard holds consecutive tensors whose source bytes fit `options.shard_bytes`; a larger tensor has its own shard.

    Args:
        checkpoint: the model; its stacks that are to be coded are split into matrices here.
        options: of compression, from `with_size`.
        order: names that come first, in this order; the others follow in the order of the checkpoint.
    Raises:
        FormatError: the checkpoint has no tensors.
        UnsupportedError: a stack has a type that is not coded, or integers are where weights belong.
        ValueError: an option does not suit the checkpoint.
    """
    checkpoint.check_integers(tuple(override.pattern for override in options.overrides if override.bits is None))
    imported = _imported(checkpoint, options)
    if imported:
        tensors = _plan_imported(checkpoint, imported, options)
    else:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        tensors = plan_tensors(shapes, options.bits or DEFAULT_BITS, options.overrides, options.granularity)
    tensors = split_stacks(checkpoint, make_lossless(checkpoint, tensors, options))
    if not tensors:
        raise FormatError(f"{checkpoint.path} has no tensors")
    tensors = {name: tensors[name] for name in [*order, *tensors] if name in tensors}
    # A tensor without weights has nothing to code.
    coded = tuple(name for name, plan in tensors.items() if not plan.is_kept and checkpoint.tensors[name].weights)
    shards = _share_out({name: checkpoint.tensors[name].size_bytes for name in tensors}, options.shard_bytes)
    return Plan(MappingProxyType(tensors), coded, imported, shards)


def _imported(checkpoint: Checkpoint, options: CodingOptions) -> Mapping[str, ImportedMatrix]:
    """The matrices whose integers are taken over; those of fp8 only if nothing asks for other integers."""
    if checkpoint.imported or options.bits is not None or options.target is not None or options.trellis:
        return checkpoint.imported
    return checkpoint.fp8


def _plan_imported(
    checkpoint: Checkpoint, imported: Mapping[str, ImportedMatrix], options: CodingOptions
) -> dict[str, TensorPlan]:
    """Plan a checkpoint that is quantized already: the other tensors are kept unless an override names them.

    Raises:
        ValueError: the options would quantize a second time.
    """
    where = f"{checkpoint.path} is quantized already ({checkpoint.quantization}), and its integers are kept"
    if options.target is not None or options.bits is not None:
        alternatives = (
            "{}: leave out {}, {} and {}, or compress the checkpoint that it was made from; "
            "{} quantizes the tensors that it left alone"
        )
        sizes = Option("bits"), Option("bpw"), Option("size")
        some = Option("overrides", {Placeholder("GLOB"): Placeholder("N")})
        raise OptionError(Message(alternatives, where, *sizes, some))
    if options.trellis:
        raise OptionError(Message("{}: leave out {}, which rounds", where, Option("trellis")))
    others = {name: info.shape for name, info in checkpoint.tensors.items() if name not in imported}
    for override in options.overrides:
        if not any(fnmatchcase(name, override.pattern) for name in others):
            raise ValueError(
                f"{where}; the pattern {override.pattern!r} matches none of the {len(others)} other tensors"
            )
    overrides = [BitsOverride("*", None), *options.overrides] if others else []
    plans = plan_tensors(others, DEFAULT_BITS, overrides, options.granularity)
    return {name: plans.get(name, TensorPlan(None, is_imported=True)) for name in checkpoint.tensors}


def _share_out(sizes: Mapping[str, int], shard_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Names in order, as many to a shard as fit `shard_bytes`."""
    shards: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not shards or used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return tuple(map(tuple, shards))
