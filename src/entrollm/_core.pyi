"""Types of the native module."""

import numpy as np
from numpy.typing import NDArray

VECTOR: int
SLACK_BYTES: int
MAX_BLOCK: int
MAX_BLOCK_COLUMNS: int

class CorruptBlockError(ValueError): ...

def isa() -> str: ...
def isas() -> list[tuple[str, bool]]: ...

class ThreadPool:
    def __init__(self, threads: int) -> None: ...
    @property
    def size(self) -> int: ...

class Geometry:
    def __init__(self, rows: int, columns: int, block_rows: int, block_columns: int) -> None: ...
    @property
    def blocks(self) -> int: ...

class CodedMatrix:
    def __init__(
        self,
        program: bytes,
        low_bits: int,
        geometry: Geometry,
        dense: NDArray[np.uint8],
        sparse: NDArray[np.uint8],
        sparse_sizes: NDArray[np.uint16],
        scale: NDArray[np.float32],
        offset: NDArray[np.float32] | None,
        column_scale: NDArray[np.float32] | None,
    ) -> None: ...
    def multiply(self, x: NDArray[np.float32], pool: ThreadPool) -> NDArray[np.float32]: ...
    def multiply_groups(
        self,
        x: NDArray[np.float32],
        size: int,
        scale: NDArray[np.float32],
        shift: NDArray[np.float32] | None,
        values: NDArray[np.float32] | None,
        pool: ThreadPool,
    ) -> NDArray[np.float32]: ...
    def decode(self, begin: int, end: int, pool: ThreadPool) -> NDArray[np.uint8]: ...
    def dequantize(self, rows: NDArray[np.int64], pool: ThreadPool) -> NDArray[np.float32]: ...

def multiply(matrices: list[CodedMatrix], x: NDArray[np.float32], pool: ThreadPool) -> NDArray[np.float32]: ...
def encode(
    program: bytes, low_bits: int, symbols: NDArray[np.uint8], block_rows: int, block_columns: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]: ...
def histogram(symbols: NDArray[np.uint8]) -> NDArray[np.int64]: ...
