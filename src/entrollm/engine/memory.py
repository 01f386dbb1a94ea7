"""In which form the engine holds matrices: in the file, or flat in memory, which multiplies faster."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, get_args
from weakref import WeakSet

from entrollm import _core
from entrollm.errors import CorruptStreamError
from entrollm.format.code import RAW_BITS, Code, Field, Node
from entrollm.format.flat import FlatCode
from entrollm.format.group_scales import GroupedKind
from entrollm.format.lossless import LosslessKind
from entrollm.format.reader import CompressedModel
from entrollm.format.spec import TensorSpec
from entrollm.matrix import CodedMatrix
from entrollm.system import memory_bytes

Form = Literal["auto", "file", "fast"]
Memory = Form | int

_logger = logging.getLogger(__name__)

# What is free for flat matrices: the rest is for caches and other programs.
_USABLE = 0.8
# Bits a weight that the flat form takes more, at most, over Gaussian sources of 1.5 to 5.6 bits (measured: 0.4 to 0.8).
_EXTRA_BITS = 0.9
# What half steps of a trellis take more than its symbols.
_TRELLIS_BITS = 1.0
# Bits a row that a copy of a flat code takes more: where its patches begin.
_COPY_BITS = 32
# AVX-512 decodes cascades while it multiplies, at 24 Gweights/s a core; flat fields take half as much work and more
# bytes. Two cores make 48 tokens per second flat and 35 from the file (1.1B shape, 3.3 stored bits, in one run). More
# cores are bound by the bytes, from about five at the 60 GB/s of two channels of DDR5. Trees are decoded first, and
# flat is faster.
_FUSED_ISAS = ("avx512", "amx")
_MOST_FLAT_THREADS = 4
# Weights from which a matrix that is flat in the file is used there. Copies of the small matrices of a model of 135 M
# weights gain 2 to 9 %. Those of a model of 1.1 G weights gain up to 5 %, and its first token would come 0.5 s later.
_LEAST_IN_PLACE = 1 << 23
# Of the native product: see make_cascade.
_MAX_FUSED_LOW_BITS, _MAX_FUSED_LEVELS = 4, 16
# Of the native product with lossless words: see LosslessProduct::can_fuse.
_FUSED_COLUMNS, _MAX_FUSED_LOSSLESS_ROOT = 512, 4


def check_memory(memory: str | int) -> Memory:
    """Return `memory`.

    Raises:
        ValueError: it is neither one of the choices nor a number of bytes.
    """
    if isinstance(memory, int):
        if memory < 1:
            raise ValueError(f"memory should be at least 1 byte, found {memory}")
        return memory
    choices: tuple[Form, ...] = get_args(Form)
    for choice in choices:
        if memory == choice:
            return choice
    raise ValueError(f"memory should be one of {', '.join(choices)}, found {memory!r}")


def is_fused(code: Code) -> bool:
    """Whether AVX-512 decodes and multiplies a code in one pass: a chain of fields that escape to the next."""
    levels = 0
    node: Node | None = code.tree
    while isinstance(node, Field):
        levels += 1
        if levels == 1 and node.bits == RAW_BITS:
            return False
        node = node.escape
    return node is None and levels <= _MAX_FUSED_LEVELS and code.low_bits <= _MAX_FUSED_LOW_BITS


def is_faster_flat(spec: TensorSpec, isa: str, threads: int) -> bool:
    """Whether an instruction set multiplies with the flat form of a matrix faster than with its code.

    Args:
        spec: of the matrix. With group scales or a trellis, no instruction set multiplies while it decodes; with a
            trellis, none multiplies flat fields of the file either. Other small matrices that are flat in the file gain
            from the pages that memory has for them.
        isa: the name of the instruction set, as `_core.isa()` has it.
        threads: of products.
    """
    if isa == "scalar":
        return False
    if spec.has_trellis:
        return True
    if isinstance(spec.code, FlatCode):
        return spec.rows * spec.columns < _LEAST_IN_PLACE
    if isinstance(spec.kind, GroupedKind) or isa not in _FUSED_ISAS:
        return True
    if isinstance(spec.kind, LosslessKind):
        return not _is_fused_lossless(spec, spec.kind, spec.code)
    return threads <= _MOST_FLAT_THREADS or not is_fused(spec.code)


def _is_fused_lossless(spec: TensorSpec, kind: LosslessKind, code: Code) -> bool:
    """Whether AVX-512 decodes and multiplies a lossless matrix in one pass, which takes two cores as long as flat."""
    widths = (spec.columns, min(spec.columns, spec.blocks.columns))
    if kind.type != "BF16" or any(width % _FUSED_COLUMNS for width in widths):
        return False
    return is_fused(code) and code.low_bits == 0 and _root_bits(code) <= _MAX_FUSED_LOSSLESS_ROOT


def _root_bits(code: Code) -> int:
    return code.tree.bits if isinstance(code.tree, Field) else RAW_BITS


class MemoryPlan:
    """Which matrices of a folder are to be flat.

    Args:
        model: the folder.
        memory: "file" or a number of bytes for none, "fast" for all, "auto" for those that are faster flat on this
            machine, if all of them fit its memory.
        threads: of products.
    Attributes:
        flat: the names of the matrices to transcode, or to copy, when they are first multiplied with.
        flat_bytes: about what their flat forms take.
        available_bytes: memory that was free; `None` if unknown.
    """

    def __init__(self, model: CompressedModel, memory: Memory, threads: int) -> None:
        self.available_bytes = available_memory_bytes()
        sizes = {}
        for name, spec in model.specs.items():
            weights = spec.rows * spec.columns
            bits = sum(array.nbytes for array in model.entries(name).values()) * 8 / weights
            if isinstance(spec.kind, LosslessKind):
                bits -= spec.kind.low_bits
            extra = _COPY_BITS / spec.columns if isinstance(spec.code, FlatCode) else _EXTRA_BITS
            extra += _TRELLIS_BITS if spec.has_trellis else 0
            if memory == "fast" or (memory == "auto" and is_faster_flat(spec, _core.isa(), threads)):
                sizes[name] = round(min(8.0, bits + extra) * weights / 8)
        self.flat_bytes = sum(sizes.values())
        fits = self.available_bytes is None or self.flat_bytes <= _USABLE * self.available_bytes
        self.flat = frozenset(sizes) if memory == "fast" or fits else frozenset()


def available_memory_bytes() -> int | None:
    """Memory that this process can take before others suffer: of the machine and, if less, of its control group."""
    found = [size for size in (_machine_memory(), _group_memory()) if size is not None]
    return min(found) if found else None


def _machine_memory(path: Path = Path("/proc/meminfo")) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):  # another system, or another form
        pass
    return memory_bytes() // 2  # what is free is unknown


def _group_memory(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit = int((folder / "memory.max").read_text())  # "max" if there is none
        used = int((folder / "memory.current").read_text())
        fields = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = {name: int(size) for name, size in fields}.get("inactive_file", 0)
    except (OSError, ValueError):
        return None
    return max(0, limit - used + cached)


class MatrixSlot:
    """One matrix of a model in the form that it has now. Safe to use from several threads, and after a fork.

    Args:
        matrix: the matrix, coded.
        becomes_flat: whether it is to be transcoded when it is first multiplied with.
        on_flat: called once it is, when its bytes in the file are no longer read.
        check: called before its bytes are first used; raises CorruptStreamError if they are damaged. `None` for no
            check.
    """

    def __init__(
        self,
        matrix: CodedMatrix,
        becomes_flat: bool,
        on_flat: Callable[[], None],
        check: Callable[[], None] | None = None,
    ) -> None:
        self._matrix = matrix
        self._becomes_flat = becomes_flat and matrix.can_be_flat
        self._on_flat = on_flat
        self._check = check
        self._lock = threading.Lock()
        _slots.add(self)

    @property
    def matrix(self) -> CodedMatrix:
        """The matrix as it is, checked or not."""
        return self._matrix

    def checked(self) -> CodedMatrix:
        """The matrix in the form that it has, to look rows up in.

        Raises:
            CorruptStreamError: its bytes differ from their checksum.
        """
        if self._check is not None:
            with self._lock:
                self._run_check()
        return self._matrix

    def ready(self, pool: _core.ThreadPool) -> CodedMatrix:
        """The matrix to multiply with, transcoded first if that is due.

        Raises:
            CorruptStreamError: its bytes differ from their checksum, or a block does not decode.
        """
        if self._becomes_flat or self._check is not None:
            with self._lock:
                self._run_check()
                if self._becomes_flat:
                    self._transcode(pool)
        return self._matrix

    def check_ahead(self) -> None:
        """Check the bytes, unless another thread uses or prepares the matrix, which then checks them itself.

        Raises:
            CorruptStreamError: its bytes differ from their checksum.
        """
        lock = self._lock
        if self._check is not None and lock.acquire(blocking=False):
            try:
                self._run_check()
            finally:
                lock.release()

    def renew_lock(self) -> None:
        """Forget a lock that a thread of the parent process held when this process was forked."""
        self._lock = threading.Lock()

    def _run_check(self) -> None:
        if self._check is not None:
            self._check()
            self._check = None

    def _transcode(self, pool: _core.ThreadPool) -> None:
        try:
            self._matrix = self._matrix.to_flat(pool)
        except MemoryError:
            _logger.warning("%s stays in the file: the memory does not suffice for its flat form", self._matrix.name)
            self._becomes_flat = False
            return
        self._becomes_flat = False
        if self._matrix.lossless is None:  # whose low bytes stay in the file
            self._on_flat()


def prepare_ahead(slots: Sequence[MatrixSlot], looked_up: Sequence[MatrixSlot], pool: _core.ThreadPool) -> None:
    """Start threads that prepare slots in their order; they end early when the program does.

    Args:
        slots: matrices to multiply with, which are checked and transcoded.
        looked_up: matrices that are only read by row; they come first, and are checked.
        pool: threads to transcode on, beside which one more thread checks what comes next.
    """

    def run(steps: Sequence[Callable[[], object]]) -> None:
        for step in steps:
            if not threading.main_thread().is_alive():
                return
            try:
                step()
            except CorruptStreamError:
                return  # what needs the matrix says so

    in_order = [slot.checked for slot in looked_up] + [partial(slot.ready, pool) for slot in slots]
    ahead = [slot.check_ahead for slot in slots]
    for steps in (ahead, in_order) if pool.size > 1 else (in_order,):
        threading.Thread(target=run, args=(steps,), name="entrollm-prepare").start()


_slots: WeakSet[MatrixSlot] = WeakSet()


def _renew_locks() -> None:
    for slot in _slots:
        slot.renew_lock()


if hasattr(os, "register_at_fork"):
    # The thread that prepares slots ends with the fork, whatever it holds.
    os.register_at_fork(after_in_child=_renew_locks)
