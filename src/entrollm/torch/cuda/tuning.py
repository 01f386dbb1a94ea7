"""Every number that depends on the GPU: one table for each family of GPUs.

To support another family, add a table here and name it in `FAMILIES`. "Measured" below means measured on an H200 with
benchmarks/cuda; docs/research/cuda.md has the measurements ("What bounds it").
"""

from __future__ import annotations

from dataclasses import dataclass

from entrollm.errors import UnsupportedError

Capability = tuple[int, int]


@dataclass(frozen=True)
class Slots:
    """What a block of the product keeps in shared memory at once, for products with up to `vectors` vectors.

    Attributes:
        vectors: the largest batch that this is for.
        chunks: slots for chunks.
        open_tiles: tiles whose sums are not complete; more than `chunks`.
    """

    vectors: int
    chunks: int
    open_tiles: int


@dataclass(frozen=True)
class Tuning:
    """What the kernels are tuned to for one family of GPUs.

    Attributes:
        family: its name.
        capability: the oldest compute capability of the family.
        multiprocessors: of the GPU that matrices are cut for.
        multiprocessor_bytes: shared memory of a multiprocessor.
        product_threads: threads of a multiprocessor in a product; two blocks share them equally.
        product_slots: for growing numbers of vectors; the last sets the largest batch of one launch.
        fewest_slots: slots for chunks with which a product is worth starting; with fewer, warps wait for memory.
        wanted_slots: slots that long rows must leave room for with one vector.
        early_bytes: chunks that a multiprocessor requests before it reads x, in bytes.
        decode_threads: threads of a block that decodes to memory.
        decode_slots: its slots for chunks.
        chunk_bytes: the size of chunks to aim at.
        largest_chunk_bytes: the largest chunk that is considered when shared memory is planned.
        tile_bytes: the largest tile with which two blocks share a multiprocessor.
        start_spans: cost of starting and ending two segments, in pairs of spans.
        wait_spans: cost of a turn of warps whose chunks are requested only when the turn before has ended, likewise.
        chunk_cost: cost of every chunk beyond the fewest, as a share of the whole.
        fewest_spans: spans of a segment at least; in shorter ones warps have too little to do.
        fewest_shared_spans: the same where two blocks share a multiprocessor.
    """

    family: str
    capability: Capability
    multiprocessors: int
    multiprocessor_bytes: int
    product_threads: int
    product_slots: tuple[Slots, ...]
    fewest_slots: int
    wanted_slots: int
    early_bytes: int
    decode_threads: int
    decode_slots: int
    chunk_bytes: int
    largest_chunk_bytes: int
    tile_bytes: int
    start_spans: float
    wait_spans: float
    chunk_cost: float
    fewest_spans: int
    fewest_shared_spans: int

    @property
    def max_batch(self) -> int:
        """Vectors that one product takes; for more, the matrix is decoded to memory."""
        return self.product_slots[-1].vectors

    @property
    def warps(self) -> int:
        """Warps of a multiprocessor in a product."""
        return self.product_threads // 32

    def slots(self, batch: int) -> Slots:
        """What a product with `batch` vectors keeps in shared memory."""
        return next(slots for slots in self.product_slots if batch <= slots.vectors)


HOPPER = Tuning(
    family="Hopper",
    capability=(9, 0),  # bulk copies with barriers, which the kernels are built on, begin with Hopper
    multiprocessors=132,  # H100 SXM and H200, by NVIDIA's data sheets
    multiprocessor_bytes=228 << 10,  # CUDA C++ Programming Guide, technical specifications of 9.0
    product_threads=768,  # measured: 28 warps gain 1 to 2 % on one shape and lose as much on others; 32 are slower
    product_slots=(
        Slots(vectors=4, chunks=12, open_tiles=16),
        Slots(vectors=8, chunks=6, open_tiles=8),  # sums of more vectors leave room for fewer
    ),
    fewest_slots=3,
    wanted_slots=4,
    early_bytes=20 << 10,  # what memory delivers before x can be read; with more requested, x arrives last
    decode_threads=512,  # measured: 20 and 24 warps are slower than 16
    decode_slots=8,
    chunk_bytes=43 << 9,  # of larger chunks too few fit; each chunk has starts, and lanes that end early
    largest_chunk_bytes=32 << 10,
    tile_bytes=40 << 10,  # the tile, the table and x fit in half of the shared memory
    start_spans=3.0,  # this and the next two: fitted to measured times of products
    wait_spans=6.0,
    chunk_cost=0.03,
    fewest_spans=3,
    fewest_shared_spans=2,
)

FAMILIES = (HOPPER,)
"""All tables, the oldest family first."""

MIN_CAPABILITY = FAMILIES[0].capability
"""The oldest compute capability that the kernels support."""


def tuning_of(capability: Capability) -> Tuning:
    """The table for a compute capability: that of the newest family that is not newer.

    Raises:
        UnsupportedError: the GPU is older than all families.
    """
    if capability < MIN_CAPABILITY:
        raise UnsupportedError(
            f"the GPU kernels need compute capability {dotted(MIN_CAPABILITY)} or later, this is {dotted(capability)}"
        )
    return next(tuning for tuning in reversed(FAMILIES) if capability >= tuning.capability)


def dotted(capability: Capability) -> str:
    """A compute capability as it is written, such as 9.0."""
    return f"{capability[0]}.{capability[1]}"
