"""Vectors are laid out as the kernels read them."""

from __future__ import annotations

import pytest
import torch

from entrollm.torch.cuda.launch import aligned


@pytest.mark.parametrize("columns", [4, 6, 7])
@pytest.mark.parametrize("start", [0, 1])
def test_vectors_are_padded_and_aligned(columns: int, start: int) -> None:
    x = torch.arange(2 * 3 * columns + 1.0)[start : start + 2 * 3 * columns].reshape(3, -1)[:, :columns]
    found = aligned(x)
    assert found.is_contiguous() and found.data_ptr() % 16 == 0 and found.shape[1] % 4 == 0
    assert torch.equal(found[:, :columns], x) and not found[:, columns:].any()


def test_aligned_vectors_are_not_copied() -> None:
    x = torch.zeros(2, 8)
    assert aligned(x) is x
