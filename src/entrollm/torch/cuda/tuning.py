"""Every number that depends on the GPU: one table for each family of GPUs.

To support another family, add a table here and name it in `FAMILIES`. "Measured" below means measured on an H200 with
benchmarks/cuda; docs/research/cuda.md has the measurements ("What bounds it"). Only Hopper's table has been tuned. The
others differ from it where their shared memory does, and take their own sizes from the technical specifications of the
CUDA C++ Programming Guide and numbers of multiprocessors from NVIDIA's data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        family: its name, with the GPU whose multiprocessors are counted.
        capability: the oldest compute capability of the family.
        multiprocessors: of a GPU of the family; where one is present, its own number replaces this one.
        multiprocessor_bytes: shared memory of a multiprocessor.
        product_threads: threads of a multiprocessor in a product; two blocks share them equally.
        product_slots: for growing numbers of vectors; the last sets the largest batch of one launch.
        few_vectors: vectors of each launch where a product takes several, and where symbols have raw bits: half of the
            largest batch takes less than half of its time then.
        many_batch: vectors of products that take several launches at most, with matrices of at least `many_weights`
            weights; smaller ones are decoded to memory in less time.
        many_weights: see many_batch.
        fewest_slots: slots for chunks with which a product is worth starting; with fewer, warps wait for memory.
        wanted_slots: slots that long rows must leave room for with one vector.
        table_copies: copies of a code's table for 32 lanes, the preferred number first; fewer where rows are long.
        smallest_chunk_bytes: room for a chunk at least, below which fewer copies of the table are better.
        early_bytes: chunks that a multiprocessor requests before it reads x, in bytes.
        grouped_threads: threads of a multiprocessor in a product with group scales; half of them for batches of 3 or
            more, which need twice the registers.
        flat_threads: threads of a multiprocessor in a product with a flat matrix.
        flat_ahead: pieces of 16 bytes that a lane loads ahead of such a product, about.
        flat_rounded: vectors that every block of it rounds itself; more are rounded by a kernel of their own.
        flat_batch: vectors of such a product at most; for more, the matrix is decoded to memory.
        decode_threads: threads of a block that decodes to memory.
        decode_slots: its slots for chunks.
        chunk_bytes: the size of chunks to aim at.
        largest_chunk_bytes: the largest chunk that is considered when shared memory is planned.
        tile_bytes: the largest tile with which two blocks share a multiprocessor; 0 if they never do.
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
    few_vectors: int
    many_batch: int
    many_weights: int
    fewest_slots: int
    wanted_slots: int
    table_copies: tuple[int, ...]
    smallest_chunk_bytes: int
    early_bytes: int
    grouped_threads: int
    flat_threads: int
    flat_ahead: int
    flat_rounded: int
    flat_batch: int
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
    def overlaps(self) -> bool:
        """Whether a kernel may begin before the previous one of its stream ends, which began with Hopper."""
        return self.capability >= (9, 0)

    @property
    def warps(self) -> int:
        """Warps of a multiprocessor in a product."""
        return self.product_threads // 32

    def slots(self, batch: int) -> Slots:
        """What a product with `batch` vectors keeps in shared memory."""
        return next(slots for slots in self.product_slots if batch <= slots.vectors)


HOPPER = Tuning(
    family="Hopper, H200",
    capability=(9, 0),
    multiprocessors=132,  # H100 SXM and H200, by NVIDIA's data sheets
    multiprocessor_bytes=228 << 10,  # CUDA C++ Programming Guide, technical specifications of 9.0
    product_threads=768,  # measured: 28 warps gain 1 to 2 % on one shape and lose as much on others; 32 are slower
    product_slots=(
        Slots(vectors=4, chunks=12, open_tiles=16),
        Slots(vectors=8, chunks=6, open_tiles=8),  # sums of more vectors leave room for fewer
    ),
    few_vectors=4,  # this and the next two: measured, see the table of flat matrices in docs/research/cuda.md
    many_batch=12,
    many_weights=1 << 25,
    fewest_slots=3,
    wanted_slots=4,
    table_copies=(32,),  # one for each lane: no two of them wait for each other
    smallest_chunk_bytes=6 << 10,  # a chunk of 4096 x 16 weights at 2.6 bits in three; not measured
    early_bytes=20 << 10,  # what memory delivers before x can be read; with more requested, x arrives last
    grouped_threads=1024,
    flat_threads=768,
    flat_ahead=4,
    flat_rounded=16,
    flat_batch=64,
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

# With 164 KB, one vector of 14336 columns and raw bits leaves room for four chunks of 11 KB. Half of that memory would
# not hold a table, activations and a tile, so that blocks never share a multiprocessor.
AMPERE_SERVER = replace(
    HOPPER,
    family="Ampere, A100",
    capability=(8, 0),  # the oldest with the matrix unit's m16n8k32 product, asynchronous copies and their barriers
    multiprocessors=108,
    multiprocessor_bytes=164 << 10,
    # This number and those of the 100 KB below were measured with these kernels and that much memory on an H200.
    product_threads=512,  # 384 and 768 are slower
    table_copies=(32, 16),
    tile_bytes=0,
)
# With 100 KB, the table takes a third. Lanes that share a copy of it wait for each other, but these GPUs have less
# memory bandwidth for each multiprocessor than Hopper, so that they can spend more instructions on a byte.
AMPERE = replace(
    AMPERE_SERVER,
    family="Ampere, RTX 3060",
    capability=(8, 6),
    multiprocessors=28,
    multiprocessor_bytes=100 << 10,
    table_copies=(16, 8),  # 32 copies take 4 to 10 % more time, since fewer chunks fit
    chunk_bytes=17 << 9,
    fewest_spans=2,  # 3 take up to 12 % more
)
ORIN = replace(AMPERE_SERVER, family="Ampere, Orin", capability=(8, 7), multiprocessors=8)
ADA = replace(AMPERE, family="Ada, RTX 4090", capability=(8, 9), multiprocessors=128)
BLACKWELL_SERVER = replace(HOPPER, family="Blackwell, B200", capability=(10, 0), multiprocessors=148)
BLACKWELL = replace(AMPERE, family="Blackwell, RTX 5090", capability=(12, 0), multiprocessors=170)

FAMILIES = (AMPERE_SERVER, AMPERE, ORIN, ADA, HOPPER, BLACKWELL_SERVER, BLACKWELL)
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
