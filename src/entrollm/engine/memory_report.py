"""What a folder's matrices take in each form that the engine can hold them in, measured by transcoding them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from entrollm import _core
from entrollm.checkpoint.names import natural_key
from entrollm.engine.memory import MemoryPlan
from entrollm.format.flat import AnyCode
from entrollm.format.reader import CompressedModel
from entrollm.matrix import matrix_of


@dataclass(frozen=True, slots=True)
class MatrixForms:
    """One matrix.

    Attributes:
        name: of the tensor.
        weights: how many it has.
        code: of its bytes in the file, of which it has file_bytes.
        flat_bytes: what its flat form takes in memory; `None` if it has none.
        flat_rows: how many rows have fields of each width, by bits.
        is_flat: whether "auto" multiplies with the flat form on this machine.
    """

    name: str
    weights: int
    code: AnyCode
    file_bytes: int
    flat_bytes: int | None
    flat_rows: dict[int, int]
    is_flat: bool


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """A folder.

    Attributes:
        matrices: its coded matrices.
        isa: the instruction set that it was made for.
        available_bytes: memory that was free; `None` if unknown.
    """

    matrices: tuple[MatrixForms, ...]
    isa: str
    available_bytes: int | None

    def memory_bytes(self, memory: str) -> tuple[int, int]:
        """Bytes in memory of its own, and bytes of the file that are read, with "file", "fast" or "auto"."""
        own = file = 0
        for matrix in self.matrices:
            is_flat = memory == "fast" or (memory == "auto" and matrix.is_flat)
            if is_flat and matrix.flat_bytes is not None:
                own += matrix.flat_bytes
            else:
                file += matrix.file_bytes
        return own, file


def report_memory(
    model: CompressedModel, pool: _core.ThreadPool, on_progress: Callable[[float, float], None] | None = None
) -> MemoryReport:
    """Transcode every matrix once, on `pool`, and report what it takes.

    Args:
        model: the folder.
        pool: threads to transcode on.
        on_progress: called with the weights done and the weights in all.
    Raises:
        FormatError: a matrix is malformed or does not decode.
    """
    plan = MemoryPlan(model, "auto", pool.size)
    total = sum(spec.rows * spec.columns for spec in model.specs.values())
    done = 0
    found = []
    for name, spec in model.specs.items():
        matrix = matrix_of(model, name)
        flat = matrix.to_flat(pool) if matrix.can_be_flat else matrix
        found.append(
            MatrixForms(
                name=name,
                weights=spec.rows * spec.columns,
                code=spec.code,
                file_bytes=matrix.stored_bytes,
                flat_bytes=flat.flat_bytes,
                flat_rows=flat.flat_rows,
                is_flat=flat.is_flat and name in plan.flat,
            )
        )
        model.release(name)
        done += spec.rows * spec.columns
        if on_progress is not None:
            on_progress(done, total)
    found.sort(key=lambda matrix: natural_key(matrix.name))
    return MemoryReport(tuple(found), _core.isa(), plan.available_bytes)
