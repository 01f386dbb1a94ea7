"""What a code costs: stored bits and modelled decode cycles, the currency in which code shapes are compared."""

from __future__ import annotations

from dataclasses import dataclass

from entrollm._core import VECTOR

# Cycles per 64 symbols on a core with AVX-512 VBMI2, from instruction counts: loads and table look-ups issue about
# one a cycle, an expansion takes two slots of the one shuffle port.
_FIELD_CYCLES = 1.5
_PLANE_CYCLES = 1.0
_ESCAPE_CYCLES = 3.0
_SPLIT_CYCLES = 5.0
_NODE_CYCLES_PER_BLOCK = 60.0
# A list of bits ends in the middle of a byte: half a byte is lost per plane.
_PADDING_BITS = 3.5


@dataclass(frozen=True, slots=True)
class CostModel:
    """Linear cost of a node: bits, plus `bits_per_cycle` times the cycles per 64 weights it takes.

    Attributes:
        bits_per_cycle: what a cycle per 64 weights is worth, in bits per weight.
        weights: weights in the tensor.
        blocks: blocks in the tensor; each pays padding and a fixed time for every list.
    """

    bits_per_cycle: float
    weights: int
    blocks: int

    def _cycles(self, cycles: float, count: float) -> float:
        return self.bits_per_cycle * cycles * count

    def sparse_list(self, bits: int, count: float, escape: bool) -> float:
        """Cost of a list of `count` fields below the root, in bits over the whole tensor."""
        planes = 0 if bits == 8 else bits
        used_blocks = min(self.blocks, count)
        cycles = _FIELD_CYCLES + _PLANE_CYCLES * planes + _ESCAPE_CYCLES * escape
        fixed = _NODE_CYCLES_PER_BLOCK * VECTOR
        return (
            count * bits
            + used_blocks * _PADDING_BITS * planes
            + self._cycles(cycles, count)
            + (self._cycles(fixed, self.blocks))
        )

    def split(self, count: float) -> float:
        """Cost of a split of `count` symbols below the root."""
        fixed = _NODE_CYCLES_PER_BLOCK * VECTOR
        padding = min(self.blocks, count) * _PADDING_BITS
        return count + padding + self._cycles(_SPLIT_CYCLES, count) + self._cycles(fixed, self.blocks)

    def root(self, bits: int, escape: bool, is_split: bool) -> float:
        """Cost of the root's dense fields, with the two 16-bit numbers that each block with lists stores."""
        sub_fields = bits.bit_count() if bits < 8 else 1
        cycles = _SPLIT_CYCLES if is_split else _FIELD_CYCLES * sub_fields + _ESCAPE_CYCLES * escape
        return self.weights * bits + 32 * self.blocks * (escape or is_split) + self._cycles(cycles, self.weights)

    def low(self, bits: int) -> float:
        """Cost of raw low bits."""
        return self.weights * bits + self._cycles(_FIELD_CYCLES * bits.bit_count(), self.weights)
