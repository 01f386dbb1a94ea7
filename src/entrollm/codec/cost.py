"""The cost of a code: stored bits and modelled decoding cycles, by which trees are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from entrollm._core import VECTOR

Processor = Literal["x86", "arm", "avx512"]
"""What will run the model: a PC with AVX2, a board or phone with NEON, or a server with AVX-512 and many cores."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Cycles per 64 symbols that a processor needs to decode and multiply.

    Attributes:
        sub_field: for a sub-field of 8, 4 or 2 bits of the root's fields or of the low bits.
        root_plane: for a sub-field of 1 bit of these.
        root_escape: to merge the root's escapes.
        fields: for a list of fields, whatever their width.
        plane: for a bit plane of a list.
        escape: to merge the escapes of a list.
        raw: for a list of raw bytes.
        split: for a split.
        node: for a list, once in each block.
    """

    sub_field: float
    root_plane: float
    root_escape: float
    fields: float
    plane: float
    escape: float
    raw: float
    split: float
    node: float


# AVX-512 with VBMI2 and GFNI. Fitted, with an RMS error of 0.65, to 82 cascades over Gaussian sources that were decoded
# and multiplied from the first-level cache. Lists with and without escapes cost about the same.
_AVX512 = Machine(
    sub_field=1.5, root_plane=1.0, root_escape=1.7, fields=0.0, plane=2.2, escape=0.0, raw=1.0, split=5.0, node=52.0
)
MACHINES: dict[Processor, Machine] = {
    "avx512": _AVX512,
    # AVX2 multiplies flat matrices; its times of other codes are about in the same proportions.
    "x86": _AVX512,
    # NEON. Instructions were counted under an emulator (docs/research/arm.md) and are taken as eight to a cycle: in the
    # time of eight instructions, the memory of a small board delivers about four bytes to each core, as much as the
    # memory of a large machine delivers in a cycle.
    "arm": Machine(
        sub_field=1.6, root_plane=1.9, root_escape=6.2, fields=0.6, plane=1.8, escape=5.5, raw=1.0, split=9.7, node=38.0
    ),
}
# A bit plane ends inside a byte, which wastes about half a byte.
_PADDING_BITS = 3.5


@dataclass(frozen=True, slots=True)
class CostModel:
    """The cost of a node: its bits, plus `bits_per_cycle` times its cycles per 64 weights.

    Attributes:
        bits_per_cycle: what a cycle per 64 weights is worth, in bits per weight.
        weights: weights of the matrix.
        blocks: blocks of the matrix; each pays padding and a fixed time for every list.
        machine: the processor that decodes.
    """

    bits_per_cycle: float
    weights: int
    blocks: int
    machine: Machine = MACHINES["x86"]

    def _cycles(self, cycles: float, count: float) -> float:
        return self.bits_per_cycle * cycles * count

    def sparse_list(self, bits: int, count: float, escape: bool) -> float:
        """Cost of a list of `count` fields below the root, in bits over the whole matrix."""
        machine = self.machine
        planes = 0 if bits == 8 else bits
        used_blocks = min(self.blocks, count)
        cycles = machine.fields + machine.plane * planes + machine.escape * escape if planes else machine.raw
        return (
            count * bits
            + used_blocks * _PADDING_BITS * planes
            + self._cycles(cycles, count)
            + self._cycles(machine.node * VECTOR, self.blocks)
        )

    def split(self, count: float) -> float:
        """Cost of a split of `count` symbols below the root."""
        padding = min(self.blocks, count) * _PADDING_BITS
        fixed = self._cycles(self.machine.node * VECTOR, self.blocks)
        return count + padding + self._cycles(self.machine.split, count) + fixed

    def root(self, bits: int, escape: bool, is_split: bool) -> float:
        """Cost of the root's dense fields and of the two 16-bit numbers that each block with lists stores."""
        cycles = self.machine.split if is_split else self._dense(bits) + self.machine.root_escape * escape
        return self.weights * bits + 32 * self.blocks * (escape or is_split) + self._cycles(cycles, self.weights)

    def low(self, bits: int) -> float:
        """Cost of raw low bits."""
        return self.weights * bits + self._cycles(self._dense(bits), self.weights)

    def _dense(self, bits: int) -> float:
        """Cycles to read 64 dense fields, which are sub-fields of 8, 4, 2 and 1 bits."""
        sub_fields = (bits & 8) // 8 + (bits & 4) // 4 + (bits & 2) // 2
        return self.machine.sub_field * sub_fields + self.machine.root_plane * (bits & 1)
