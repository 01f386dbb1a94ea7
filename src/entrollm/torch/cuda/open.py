"""The choice of a form for a matrix on a GPU: coded, flat, with group scales, or lossless."""

from __future__ import annotations

import torch
from torch import Tensor

from entrollm.errors import UnsupportedError
from entrollm.format.flat import FlatCode
from entrollm.matrix import CodedMatrix
from entrollm.threads import start_pool
from entrollm.torch.cuda.device_matrix import transcode
from entrollm.torch.cuda.flat import choose_widths, pack_flat
from entrollm.torch.cuda.flat_matrix import FlatCudaMatrix
from entrollm.torch.cuda.grouped import GroupedCudaMatrix
from entrollm.torch.cuda.layout import MAX_COLUMNS
from entrollm.torch.cuda.lossless import pack_lossless
from entrollm.torch.cuda.lossless_matrix import LosslessCudaMatrix
from entrollm.torch.cuda.matrix import CudaMatrix
from entrollm.torch.cuda.triples import choose_triple_code

# What the coded layout takes for each bit of codewords and raw bits; docs/research/cuda.md has what else is in it.
_CODED_SHARE = 1.07


def open_cuda(
    matrix: CodedMatrix, device: torch.device, is_fast: bool
) -> CudaMatrix | FlatCudaMatrix | GroupedCudaMatrix:
    """Decode a matrix on the CPU and write it on a GPU, in the form that suits it.

    Matrices with group scales keep them. Others are flat if their file has flat codes or if that takes no more memory,
    and otherwise coded.

    Args:
        matrix: the matrix.
        device: the GPU.
        is_fast: whether it is to be flat in any case.
    Raises:
        UnsupportedError: the device is not an NVIDIA GPU, is too old, or the matrix does not fit in the layout.
    """
    device = _numbered(device)
    if matrix.groups is not None:
        return GroupedCudaMatrix(matrix, device)
    symbols = torch.from_numpy(matrix.symbols(0, matrix.spec.rows, start_pool())).to(device)
    scale, offset, column_scale = (
        None if values is None else torch.from_numpy(values)
        for values in (matrix.scale, matrix.offset, matrix.column_scale)
    )
    assert scale is not None
    code = choose_triple_code(torch.bincount(symbols.reshape(-1), minlength=256).tolist())
    widths = choose_widths(symbols)
    is_smaller = widths.total_bits <= code.bits * _CODED_SHARE * symbols.numel()
    if is_fast or is_smaller or isinstance(matrix.spec.code, FlatCode):
        return FlatCudaMatrix([pack_flat(matrix.name, symbols, scale, offset, column_scale, widths)], device)
    return CudaMatrix([transcode(matrix.name, symbols, scale, offset, column_scale, code)], device)


def open_lossless_cuda(name: str, words: Tensor, device: torch.device) -> LosslessCudaMatrix | None:
    """Write a bfloat16 matrix on a GPU with its exponents in fields of 3 bits.

    Args:
        name: the matrix's name, for errors.
        words: bfloat16, shape (rows, columns), on the GPU.
        device: the GPU.
    Returns:
        The matrix; `None` if bfloat16 takes no more memory, as with many unusual exponents or few columns.
    Raises:
        UnsupportedError: the device is not an NVIDIA GPU, or is too old.
    """
    if words.shape[1] > MAX_COLUMNS:
        return None
    part = pack_lossless(name, words)
    return LosslessCudaMatrix([part], _numbered(device)) if part.size_bytes < 2 * words.numel() else None


def _numbered(device: torch.device) -> torch.device:
    """The NVIDIA GPU that a device is, by its number."""
    if device.type != "cuda" or torch.version.hip:
        raise UnsupportedError(f"the fused kernels run on NVIDIA GPUs, not on {device}")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
