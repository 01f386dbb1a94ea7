"""Products that sum over tokens, which take most of the time of a calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The lower triangle of a symmetric product is made in this many stripes, each up to the diagonal.
_STRIPES = 4


@contextmanager
def rounded(place: torch.device) -> Iterator[None]:
    """Inside of it, a GPU rounds the factors of products of float32 to TF32, three digits, but for those of `moments`.

    That is four to seven times as fast, and changes what layers compute less than the type that most models are stored
    in. Text and labels are drawn outside of it, so that they are those of any other device.
    """
    with _precision("high", place):
        yield


@contextmanager
def _precision(name: str, place: torch.device) -> Iterator[None]:
    if place.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def moments(x: Tensor) -> Tensor:
    """x^T x of float32 (n, columns).

    Returns:
        float32, shape (columns, columns), the lower triangle; some of the rest is zero.
    """
    columns = x.shape[1]
    product = x.new_zeros(columns, columns)
    across = x.T.contiguous()
    step = -(-columns // _STRIPES)
    with _precision("highest", x.device):
        for begin in range(0, columns, step):
            end = min(columns, begin + step)
            product[begin:end, :end] = across[begin:end] @ x[:, :end]
    return product


def estimate(first: Tensor, second: Tensor) -> Tensor:
    """first^T second of float32 (..., n, rows) and (..., n, columns), to three digits where that is faster.

    Factors are rounded to bfloat16 on processors that multiply it twice as fast, and to TF32 on GPUs, inside of
    `rounded`. Gradients and differences vary by far more than that from text to text. Second moments are not made in
    this way, since their small eigenvalues count.

    Returns:
        float32, shape (..., rows, columns).
    """
    if first.device.type == "cpu" and _HAS_BFLOAT16:
        return (first.bfloat16().mT @ second.bfloat16()).float()
    return first.mT @ second


def _has_bfloat16() -> bool:
    # These functions are not public. Without them, products are exact and take longer.
    known = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(is_supported() for is_supported in known if is_supported is not None)


_HAS_BFLOAT16 = _has_bfloat16()
