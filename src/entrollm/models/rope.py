"""Rotary position embeddings: the frequencies of each variant and their tables of cosines and sines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from entrollm.errors import FormatError, UnsupportedError
from entrollm.models.config_fields import MAX_FACTOR, Fields

Floats = NDArray[np.float32]
_MAX_CONTEXT = 2**31
# The types that depend on original_max_position_embeddings.
_STRETCHED = ("llama3", "yarn", "longrope")


@dataclass(frozen=True, eq=False)
class Rope:
    """Which angles a model rotates its queries and keys by.

    Attributes:
        frequencies: float32 (rotary_dim / 2,), radians per position.
        scale: factor on the cosines and sines.
        long_frequencies: used instead, for every position, once the sequence is longer than `switch_length` (longrope).
        switch_length: tokens.
        long_scale: the factor where the long frequencies are used; None if it is `scale`.
        context_factor: how far this variant stretches max_position_embeddings.
        query_growth: queries are multiplied by 1 + query_growth * log(1 + position // growth_length); 0 is off.
        growth_length: tokens.
    """

    frequencies: Floats
    scale: float = 1.0
    long_frequencies: Floats | None = None
    switch_length: int = 0
    long_scale: float | None = None
    context_factor: float = 1.0
    query_growth: float = 0.0
    growth_length: int = 0

    def is_long(self, length: int) -> bool:
        """Whether a sequence of `length` tokens uses the long frequencies."""
        return self.long_frequencies is not None and length > self.switch_length


class RopeTables:
    """Cosines and sines per position, computed once and extended as sequences grow."""

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self._tables: dict[bool, tuple[Floats, Floats]] = {}

    def rows(self, start: int, count: int, is_long: bool) -> tuple[Floats, Floats]:
        """Return (cosines, sines), each float32 (count, 1, rotary_dim / 2), of the positions from `start`."""
        stop = start + count
        table = self._tables.get(is_long)
        if table is None or len(table[0]) < stop:
            table = self._compute(max(256, 2 * stop), is_long)
            self._tables[is_long] = table
        return table[0][start:stop], table[1][start:stop]

    def query_factors(self, start: int, count: int) -> Floats | None:
        """What queries are multiplied by, float32 (count, 1, 1), at the positions from `start`; None if by 1."""
        rope = self._rope
        if not rope.query_growth:
            return None
        steps = np.arange(start, start + count, dtype=np.float32)[:, None, None] // np.float32(rope.growth_length)
        factors: Floats = 1 + np.float32(rope.query_growth) * np.log(1 + steps)
        return factors

    def _compute(self, length: int, is_long: bool) -> tuple[Floats, Floats]:
        rope, long, long_scale = self._rope, self._rope.long_frequencies, self._rope.long_scale
        frequencies = long if is_long and long is not None else rope.frequencies
        # Angles are rounded to float32 before the cosine, as in the models' training code.
        angles = np.arange(length, dtype=np.float32)[:, None, None] * frequencies
        scale = np.float32(long_scale if is_long and long_scale is not None else rope.scale)
        return np.cos(angles) * scale, np.sin(angles) * scale


@dataclass(frozen=True)
class _Source:
    """A rope section with what the variants take from the rest of config.json."""

    fields: Fields
    theta: float
    head_dim: int
    rotary_dim: int
    original_length: int
    stretch: float

    def frequencies(self) -> Floats:
        """theta ** (-2 i / rotary_dim), rounded to float32 at each step as in the models' training code."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        powers: Floats = np.float32(self.theta) ** exponents
        return np.reciprocal(powers)


@dataclass(frozen=True)
class RotatedHeads:
    """What an architecture says about the heads that are rotated.

    Attributes:
        head_dim: features per attention head.
        context_length: max_position_embeddings.
        original_context_length: what original_max_position_embeddings is by default; None for the context length.
        partial: the default of partial_rotary_factor; None if the architecture does not honour it.
        aliases: names of rope types that mean another one in this architecture.
        theta: the base of the frequencies by default.
        keys: names of fields of config.json that are not the usual ones, by the usual name.
    """

    head_dim: int
    context_length: int
    original_context_length: int | None = None
    partial: float | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    theta: float = 10000.0
    keys: Mapping[str, str] = field(default_factory=dict)


def read_rope(config: Fields, heads: RotatedHeads) -> Rope:
    """Read the rotary embedding of config.json, in today's form (rope_parameters) or the older one (rope_scaling).

    Args:
        config: the whole of config.json.
        heads: the heads that are rotated.
    Raises:
        FormatError: a value is of the wrong type or out of range.
        UnsupportedError: the rope type, or a partial rotation, is not implemented for this architecture.
    """
    fields = config.section("rope_scaling" if config.raw("rope_scaling") else "rope_parameters")
    key = heads.keys.get("rope_theta", "rope_theta")
    theta = config.number(key, heads.theta, low=1.0, high=MAX_FACTOR)
    return read_rope_section(config, fields, heads, theta)


def with_query_growth(rope: Rope, config: Fields) -> Rope:
    """The rotary embedding with the growth of queries that its section in config.json states, if it does.

    Raises:
        FormatError: a value is malformed.
    """
    fields = config.section("rope_scaling" if config.raw("rope_scaling") else "rope_parameters")
    growth = fields.number("llama_4_scaling_beta", 0.0)
    length = fields.integer("original_max_position_embeddings", high=_MAX_CONTEXT) if growth else 0
    return replace(rope, query_growth=growth, growth_length=length)


def read_rope_section(config: Fields, fields: Fields, heads: RotatedHeads, theta: float) -> Rope:
    """Read one rotary embedding.

    Args:
        config: the whole of config.json.
        fields: the section of it that describes the embedding.
        heads: the heads that are rotated.
        theta: the base of the frequencies, unless the section has it.
    Raises:
        FormatError, UnsupportedError: as for `read_rope`.
    """
    written_kind = fields.text("rope_type", fields.text("type", "default"))
    kind = heads.aliases.get(written_kind, written_kind)
    if kind not in _VARIANTS:
        supported = ", ".join(sorted(_VARIANTS))
        raise UnsupportedError(f"{fields.source}: rope type {kind!r} is not supported; supported: {supported}")
    holder, key = fields, "partial_rotary_factor"
    if key not in fields:
        holder, key = config, heads.keys.get(key, key)
    factor = holder.number(key, 1.0 if heads.partial is None else heads.partial, high=1.0)
    if factor != 1.0 and heads.partial is None:
        raise UnsupportedError(f"{holder.source}: {key} {factor} is not supported for this model type")
    rotary_dim = int(heads.head_dim * factor)
    if not 0 < rotary_dim + rotary_dim % 2 <= heads.head_dim:
        raise FormatError(
            f"{holder.source}: {rotary_dim} of {heads.head_dim} features per head cannot be rotated in pairs"
        )
    theta = fields.number("rope_theta", theta, low=1.0, high=MAX_FACTOR)
    original = heads.context_length
    if kind in _STRETCHED:
        # A field of config.json itself wins over one of the section, and so does its default where it has one.
        key, default = "original_max_position_embeddings", heads.original_context_length
        holder = config if key in config or default is not None else fields
        original = holder.integer(key, default or heads.context_length, high=_MAX_CONTEXT)
    return _VARIANTS[kind](
        _Source(fields, theta, heads.head_dim, rotary_dim, original, heads.context_length / original)
    )


def _default(source: _Source) -> Rope:
    return Rope(source.frequencies())


def _linear(source: _Source) -> Rope:
    return Rope(source.frequencies() / np.float32(source.fields.factor("factor")))


def _proportional(source: _Source) -> Rope:
    # All features of a head are rotated in pairs half a head apart, the later ones by nothing.
    whole = replace(source, rotary_dim=source.head_dim).frequencies()
    whole[source.rotary_dim // 2 :] = 0
    return Rope(whole / np.float32(source.fields.factor("factor", 1.0)))


def _llama3(source: _Source) -> Rope:
    fields = source.fields
    factor, low, high = (fields.factor(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise FormatError(f"{fields.source}: low_freq_factor {low} should be below high_freq_factor {high}")
    frequencies = source.frequencies()
    rotations = source.original_length * frequencies / np.float32(2 * math.pi)
    # Below `low` rotations per original context a frequency is divided, above `high` it is kept.
    kept = np.clip((rotations - np.float32(low)) / np.float32(high - low), 0, 1)
    return Rope(_mixed(frequencies / np.float32(factor), frequencies, kept))


def _mixed(first: Floats, second: Floats, share: Floats) -> Floats:
    """`share` of the second, the rest of the first."""
    return first + share * (second - first)


def _yarn(source: _Source) -> Rope:
    fields = source.fields
    factor = fields.factor("factor", source.stretch)
    frequencies = source.frequencies()
    fast = fields.factor("beta_fast", 32.0)
    slow = fields.factor("beta_slow", 1.0)

    def dimension(rotations: float) -> float:
        ratio = source.original_length / (rotations * 2 * math.pi)
        return source.rotary_dim * math.log(ratio) / (2 * math.log(source.theta))

    if source.theta == 1.0:
        raise fields.error("rope_theta", "a number other than 1 for the rope type yarn")
    low, high = dimension(fast), dimension(slow)
    if fields.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, source.rotary_dim - 1)
    if low == high:
        high += 0.001
    divided = np.clip((np.arange(len(frequencies)) - low) / (high - low), 0, 1)
    mixed = _mixed(frequencies, frequencies / np.float32(factor), divided.astype(np.float32))
    return Rope(mixed, _yarn_scale(fields, factor), context_factor=max(1.0, factor / source.stretch))


def _yarn_scale(fields: Fields, factor: float) -> float:
    if "attention_factor" in fields:
        return fields.number("attention_factor", high=MAX_FACTOR)
    numerator, denominator = (fields.number(key, 0.0, high=MAX_FACTOR) for key in ("mscale", "mscale_all_dim"))
    if numerator and denominator:
        return yarn_magnitude(numerator, factor) / yarn_magnitude(denominator, factor)
    return yarn_magnitude(1.0, factor)


def yarn_magnitude(weight: float, factor: float) -> float:
    """How much yarn makes scores larger where contexts are `factor` times as long, with `weight` for mscale."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(source: _Source) -> Rope:
    fields = source.fields
    frequencies = source.frequencies()
    factor = fields.factor("factor", source.stretch)
    if "attention_factor" in fields:
        scale = fields.number("attention_factor")
    elif factor <= 1 or source.original_length == 1:
        scale = 1.0
    else:
        scale = math.sqrt(1 + math.log(factor) / math.log(source.original_length))
    short: Floats = np.array(fields.factors("short_factor", len(frequencies)), dtype=np.float32)
    long: Floats = np.array(fields.factors("long_factor", len(frequencies)), dtype=np.float32)
    return Rope(frequencies / short, scale, long_frequencies=frequencies / long, switch_length=source.original_length)


_VARIANTS: Mapping[str, Callable[[_Source], Rope]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "proportional": _proportional,
    "yarn": _yarn,
    "longrope": _longrope,
}
