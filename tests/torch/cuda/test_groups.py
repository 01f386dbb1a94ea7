"""Integers with group scales in the GPU's layout, read back on the CPU, and what their kernels use."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from entrollm.torch.cuda import compile as kernels
from entrollm.torch.cuda import grouped
from entrollm.torch.cuda.grouped import GroupedFields, pack
from entrollm.torch.cuda.tuning import HOPPER
from tests.torch.cuda.groups import KINDS, random_groups


def unpack(fields: dict[int, torch.Tensor], columns: int) -> np.ndarray:
    """Read fields as the kernels do: part by part, the widest first, which has the lowest bits."""
    rows, units = next(iter(fields.values())).shape[:2]
    out = np.zeros((rows, units, 8, 4), np.uint8)
    below = 0
    for width, part in fields.items():
        words = part.numpy().reshape(rows, units, width, 4)
        for quad in range(8):
            each = 8 // width  # quads of a word
            field = words[:, :, quad // each] >> (quad % each * width) & ((1 << width) - 1)
            out[:, :, quad] |= (field << below).astype(np.uint8)
        below += width
    return out.reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [5, 64, 100])
def test_integers_survive(bits: int, columns: int) -> None:
    symbols = np.random.default_rng(0).integers(0, 1 << bits, (3, columns)).astype(np.uint8)
    symbols[1, 2] = (1 << bits) - 1
    fields = pack(torch.from_numpy(symbols))
    assert sum(fields) == bits
    assert sum(part.numel() for part in fields.values()) == 3 * -(-columns // 32) * 4 * bits
    np.testing.assert_array_equal(unpack(fields, columns), symbols)


def test_what_kernels_are_told() -> None:
    symbols, groups = random_groups("q4_k", 48, 512)
    part = GroupedFields.of("tensor", torch.from_numpy(symbols), groups)
    assert part.is_multipliable
    macros = dict(part.product_macros(HOPPER, 1, 1))
    assert macros["BITS"] == 4 and macros["SIZE"] == 32 and macros["SUPER_SIZE"] == 256
    assert [macros[name] for name in ("SCALE", "ZERO", "MINIMUM", "SUPER_SCALE", "SUPER_MINIMUM")] == [4, 0, 4, 2, 2]
    # Every macro of the sources has a value.
    for source, told in (("grouped_product.cu", macros), ("grouped_decode.cu", dict(part.decode_macros(1)))):
        used = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", re.sub(r"//.*", "", kernels.read_source(source))))
        assert used & {"BITS", "SIZE"} and not used - told.keys() - {"__CUDA_ARCH__"}
    struct = part.struct()
    assert (struct.units, struct.groups, struct.super_groups) == (16, 16, 2)
    assert struct.fours and not struct.twos
    assert part.size_bytes == 48 * 512 // 2 + 48 * (2 * 16 + 2 * 2 * 2)


def test_sizes_of_groups() -> None:
    """A product takes groups of a multiple of 8 columns, and rows that are one group."""
    for name in KINDS:
        symbols, groups = random_groups(name, 2, 500)
        part = GroupedFields.of(name, torch.from_numpy(symbols), groups)
        assert part.is_multipliable == (name != "odd groups")
        assert not part.has_nan
        assert part.group_columns % grouped.UNIT_COLUMNS == 0 or part.group_columns == KINDS[name][1].size


def test_bytes_that_are_not_numbers_are_not_multiplied() -> None:
    """Products take E4M3's NaN for a number; decoding to memory does not."""
    symbols, groups = random_groups("e4m3", 2, 128)
    symbols[1, 5] = 0xFF
    part = GroupedFields.of("tensor", torch.from_numpy(symbols), groups)
    assert part.has_nan and not part.is_multipliable
