"""The GPU's layout, written and read back on the CPU."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrollm.errors import UnsupportedError
from entrollm.matrix import CodedMatrix
from entrollm.torch.cuda import chunks, flat, layout
from entrollm.torch.cuda import compile as kernels
from entrollm.torch.cuda.chunks import Chunks, write_chunks
from entrollm.torch.cuda.device_matrix import transcode
from entrollm.torch.cuda.gpu import Gpu, typical_gpu
from entrollm.torch.cuda.launch import MAX_MATRICES
from entrollm.torch.cuda.matrix import CudaMatrix
from entrollm.torch.cuda.open import open_cuda
from entrollm.torch.cuda.plan import TablePlace, chunk_limit, plan_of
from entrollm.torch.cuda.rows import row_words
from entrollm.torch.cuda.shape import Room, Shape, choose_shape
from entrollm.torch.cuda.triples import TripleCode, choose_triple_code
from entrollm.torch.cuda.tuning import FAMILIES, HOPPER, Tuning, tuning_of
from tests.support.gpu_layout import unpack

ROOMY = Room(HOPPER)


def gpu(block_bytes: int) -> Gpu:
    """A GPU with this much shared memory for a block."""
    return replace(typical_gpu(HOPPER), block_bytes=block_bytes)


def written(symbols: np.ndarray, shape: Shape | None = None) -> tuple[Chunks, Shape, TripleCode]:
    code = choose_triple_code(np.bincount(symbols.reshape(-1), minlength=256).tolist())
    shape = shape or choose_shape("tensor", *symbols.shape, code.bits, ROOMY)
    rows = torch.zeros(len(symbols), 3, dtype=torch.int32)

    def read(begin: int, end: int) -> torch.Tensor:
        return torch.from_numpy(symbols[begin:end])

    return write_chunks("tensor", shape, code, rows, read, ROOMY), shape, code


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 330),
    st.floats(0, 60),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
)
def test_symbols_survive(rows: int, columns: int, deviation: float, middle: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = np.clip(np.rint(rng.standard_t(3, (rows, columns)) * deviation) + middle, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(unpack(*written(symbols)), symbols)


@pytest.mark.parametrize("chunks, segments", [(1, 2), (1, 8), (3, 4), (7, 2)])
def test_every_way_to_cut(chunks: int, segments: int) -> None:
    rng = np.random.default_rng(0)
    symbols = np.clip(np.rint(rng.normal(100, 3, (20, 1100))), 0, 255).astype(np.uint8)
    shape = Shape(20, 1100, chunks, segments)
    np.testing.assert_array_equal(unpack(*written(symbols, shape)), symbols)


def test_lanes_of_very_different_lengths_wait_for_each_other() -> None:
    """A row of long codewords between rows of short ones: starts are more than 8 bits apart."""
    rng = np.random.default_rng(0)
    symbols = np.full((16, 2880), 128, np.uint8)
    symbols[3] = rng.integers(124, 132, 2880)
    symbols[12, 1000:] = rng.integers(125, 131, 1880)
    found, shape, code = written(symbols, Shape(16, 2880, 2, 8))
    np.testing.assert_array_equal(unpack(found, shape, code), symbols)


@pytest.mark.parametrize("deviation", [0.2, 0.7, 1.1, 2.0, 4.0, 12.0])
def test_expected_bits_are_those_of_the_chunks(deviation: float) -> None:
    rng = np.random.default_rng(0)
    symbols = np.clip(np.rint(rng.normal(128, deviation, (64, 4096))), 0, 255).astype(np.uint8)
    code = choose_triple_code(np.bincount(symbols.reshape(-1), minlength=256).tolist())
    cut = choose_shape("tensor", 14336, 4096, code.bits, ROOMY)  # few rows would be cut into shorter segments
    found, _, _ = written(symbols, replace(cut, rows=64))
    bits = found.data.numel() * 8 / symbols.size
    counts = np.bincount(symbols.reshape(-1), minlength=256) / symbols.size
    entropy = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum()
    assert code.bits < 1.09 * max(entropy, 0.4) + 0.02
    assert code.bits < bits < 1.08 * code.bits + 0.15  # starts of segments, rows, and ragged ends


@given(st.lists(st.integers(0, 10**6), min_size=256, max_size=256).filter(any))
@settings(max_examples=30, deadline=None)
def test_tables_are_prefix_codes(counts: list[int]) -> None:
    code = choose_triple_code(counts)
    table = code.table()
    held = np.unique(code.stored)
    np.testing.assert_array_equal(code.stored[held], held)
    spent = 0
    for triple in held:
        length = int(code.lengths[triple])
        entries = table[int(code.codewords[triple]) :: 1 << length]
        assert len(set(entries.tolist())) == 1 and int(entries[0]) & 255 == length
        spent += 256 >> length
    assert spent <= 256
    assert 0 <= code.raw_bits <= 7 and (int(table.max()) >> 24) < 256


def test_row_words_keep_every_bit() -> None:
    scale, order = torch.tensor([1.5, -2.0, 1 / 3]), torch.tensor([2, 0, 1])
    words = row_words(order, scale, scale / 3)
    assert words[:, 0].tolist() == [2, 0, 1]
    assert torch.equal(words[:, 1].contiguous().view(torch.float32), scale[order])
    assert torch.equal(words[:, 2].contiguous().view(torch.float32), scale[order] / 3)
    assert not row_words(order, scale[:1], None)[:, 2].any()


@pytest.mark.parametrize("columns, raw", [(576, True), (4096, False), (4096, True), (14336, True)])
def test_one_vector_fits_the_shared_memory(columns: int, raw: bool) -> None:
    """With room for several chunks, on a GPU with 227 KB for a block."""
    room = 227 << 10
    plan = plan_of(gpu(room), 1, columns, raw, 18 << 10)
    assert plan.slots >= 3
    assert plan.end_bytes <= room


@pytest.mark.parametrize("columns", [4096, 14336, 28672])
@pytest.mark.parametrize("room", [99 << 10, 227 << 10])
def test_chunks_fit_where_rows_are_long_or_memory_is_small(columns: int, room: int) -> None:
    for bits in (1.7, 4.0, 7.5):
        limit = chunk_limit(gpu(room), columns, True)
        if limit == 0:
            assert room < 227 << 10 and columns > 4096
            continue
        shape = choose_shape("tensor", 64, columns, bits, Room(HOPPER, limit))
        assert plan_of(gpu(room), 1, columns, True, int(16 * columns * bits / 8 / shape.chunks * 1.05)).fits


def test_chunks_that_wait_for_room_fill_whole_turns_of_the_warps() -> None:
    """4096 x 14336 at 2.4 bits: two tiles a multiprocessor, which does not hold all of their chunks."""
    whole = choose_shape("tensor", 4096, 14336, 2.4, ROOMY)
    assert 2 * whole.chunks * whole.segments // 2 == 24  # pairs of segments, one for each warp
    cut = choose_shape("tensor", 4096, 14336, 2.4, Room(HOPPER, slots=lambda size: (100 << 10) // size))
    assert 2 * cut.chunks * cut.segments // 2 == 48
    # Tiles by the dozen, of which few are held: enough segments of each to keep the warps busy.
    many = choose_shape("tensor", 131072, 4096, 1.6, Room(HOPPER, slots=lambda _: 6))
    assert 6 * many.chunks * many.segments // 2 >= 18


def test_rows_that_take_many_bits_are_cut_finer() -> None:
    """One table serves the matrix; what it does not hold is patched, in some rows nearly everything."""
    rng = np.random.default_rng(0)
    symbols = rng.normal(128, 1.0, (320, 2048))
    symbols[:20] = rng.normal(128, 25.0, (20, 2048))
    symbols = np.clip(np.rint(symbols), 0, 255).astype(np.uint8)
    limit = 12 << 10
    whole, shape, code = written(symbols)
    assert whole.largest_bytes > limit
    rows = torch.zeros(len(symbols), 3, dtype=torch.int32)

    def read(begin: int, end: int) -> torch.Tensor:
        return torch.from_numpy(symbols[begin:end])

    found = write_chunks("tensor", shape, code, rows, read, Room(HOPPER, limit))
    assert found.largest_bytes <= limit
    assert found.shape.chunks > shape.chunks
    np.testing.assert_array_equal(unpack(found, found.shape, code), symbols)
    # As fine as can be, where no cut is fine enough.
    least = write_chunks("tensor", shape, code, rows, read, Room(HOPPER, 16))
    assert least.shape.chunks == least.shape.spans // 2
    np.testing.assert_array_equal(unpack(least, least.shape, code), symbols)


def test_activations_that_do_not_fit_leave_no_slots() -> None:
    assert plan_of(typical_gpu(HOPPER), 8, 14336, True, 18 << 10).slots == 0
    assert plan_of(typical_gpu(HOPPER), 1, 57344, True, 18 << 10).slots == 0


def test_rows_that_are_too_long() -> None:
    with pytest.raises(UnsupportedError, match="tensor: the GPU kernels take at most 65535 columns, this has 65536"):
        choose_shape("tensor", 16, 65536, 3.0, ROOMY)


def test_rows_whose_activations_leave_no_room_are_cut_all_the_same() -> None:
    """No product runs then, but the matrix must be there to be decoded to memory."""
    symbols = np.random.default_rng(0).integers(120, 136, (16, 60_000)).astype(np.uint8)
    assert chunk_limit(typical_gpu(HOPPER), 60_000, True) == 0
    matrix = transcode("tensor", torch.from_numpy(symbols), torch.ones(16))
    order = np.argsort(matrix.positions.numpy())
    np.testing.assert_array_equal(unpack(matrix.chunks, matrix.shape, matrix.code), symbols[order])


def test_matrices_that_are_too_large() -> None:
    code = choose_triple_code([1] * 256)
    writer = chunks._Writer("tensor", Shape(16, 4096, 1, 2), code, torch.zeros(16, 3, dtype=torch.int32))
    sizes = torch.full((1 << 15, 1, 3), 2000)  # tiles; rows of words of both streams, and patches
    with pytest.raises(UnsupportedError, match="tensor: the GPU kernels take at most 8 GiB of a matrix, this has 1"):
        writer.chunk_table(sizes)


def test_kernels_refuse_other_devices() -> None:
    with pytest.raises(UnsupportedError, match="the fused kernels run on NVIDIA GPUs, not on cpu"):
        open_cuda(cast(CodedMatrix, None), torch.device("cpu"), is_fast=False)


def test_old_gpus_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"need compute capability 8\.0 or later, this is 7\.5"):
        kernels.kernel("product.cu", "multiply", kernels.Target((7, 5)), ())


def test_kernels_of_older_gpus_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.Target.chosen((9, 0)) == kernels.Target((9, 0), is_portable=False)
    monkeypatch.setenv("ENTROLLM_CUDA_TARGET", "8.6")
    assert kernels.Target.chosen((9, 0)) == kernels.Target((8, 6), is_portable=True)
    assert kernels.Target.chosen((8, 6)) == kernels.Target((8, 6), is_portable=False)
    for text in ("9.0", "sm_80"):
        monkeypatch.setenv("ENTROLLM_CUDA_TARGET", text)
        with pytest.raises(UnsupportedError, match=rf"a compute capability up to that of .* as 8\.6; it is '{text}'"):
            kernels.Target.chosen((8, 6))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'entrollm\[cuda\]'"):
        kernels.check_installed()


def test_sources_are_complete() -> None:
    for name in ("product.cu", "decode.cu"):
        text = kernels.read_source(name)
        assert "#include" not in text
        assert text.count("struct Matrix {") == text.count("struct Ring {") == 1


def test_kernels_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC needs no GPU; a second use takes the file, and a folder that cannot be written to is no error."""
    pytest.importorskip("cuda.core")
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("ENTROLLM_CACHE", str(tmp_path))
    kernels._compiled.cache_clear()
    target, macros = kernels.Target((9, 0)), (("THREADS", 768), ("SLOTS", 8), *TablePlace(30 << 10, 32).macros())
    found = kernels._compiled("decode.cu", target, macros)
    (kept,) = (tmp_path / "cuda").iterdir()
    assert kept.read_bytes() == found
    with pytest.raises(UnsupportedError, match="NVRTC cannot compile"):
        kernels.compile_source("not a kernel", target, ())


def test_sizes_are_those_of_the_kernels() -> None:
    """What Python and the kernels both know about the layout."""
    text = "".join(kernels.read_source(name) for name in ("product.cu", "decode.cu"))

    def constant(name: str) -> str:
        (value,) = set(re.findall(rf"constexpr int {name} = ([^;]+);", text))
        return str(value)

    assert constant("kLanes") == str(layout.LANES)
    assert constant("kTileRows") == str(layout.TILE_ROWS)
    assert constant("kStreams") == str(layout.STREAMS)
    assert constant("kStepColumns") == str(layout.STEP_COLUMNS)
    assert constant("kSpanColumns") == str(layout.SPAN_COLUMNS)
    assert constant("kSpanTriples") == str(layout.SPAN_TRIPLES)
    assert constant("kUnitColumns") == str(layout.UNIT_COLUMNS)
    assert constant("kStepBytes") == str(layout.STEP_BYTES)
    assert constant("kFirstBit") == str(layout.FIRST_BIT)
    assert constant("kTogether") == str(layout.TOGETHER)
    assert constant("kMaxBounds") == str(layout.MAX_BOUNDS + 1)
    assert constant("kMaxMatrices") == str(MAX_MATRICES)
    assert constant("kTableBytes") == "kTableEntries * kCopies * 4"
    assert int(constant("kTableEntries")) * 4 == layout.TABLE_BYTES
    text = "".join(kernels.read_source(name) for name in ("flat_product.cu", "flat_decode.cu"))
    assert constant("kStripeColumns") == str(flat.STRIPE_COLUMNS)
    assert constant("kStripeSteps") == str(flat.STRIPE_STEPS)
    assert constant("kMostBits") == str(flat.MOST_BITS)
    (row,) = set(re.findall(r"struct Row {(.*?)};", text, re.DOTALL))
    assert 4 * len(re.findall(r"(?:int|float) \w+;", row)) == layout.ROW_BYTES


@pytest.mark.parametrize("tuning", FAMILIES, ids=lambda tuning: tuning.family)
def test_tables_hold_together(tuning: Tuning) -> None:
    """What the kernels require of a table of tuning, whatever GPU it is for."""
    assert tuning_of(tuning.capability) is tuning
    major, minor = tuning.capability
    assert tuning_of((major, minor + 1)).capability in (tuning.capability, (major, minor + 1))
    for slots in tuning.product_slots:
        assert slots.open_tiles > slots.chunks >= tuning.wanted_slots >= tuning.fewest_slots
        assert slots.chunks <= layout.LANES
    vectors = [slots.vectors for slots in tuning.product_slots]
    assert vectors == sorted(set(vectors)) and tuning.max_batch == vectors[-1]
    blocks = 2 if tuning.tile_bytes else 1
    for threads in (tuning.product_threads // blocks, tuning.product_threads, tuning.decode_threads):
        assert threads % layout.LANES == 0 and threads > layout.MAX_BOUNDS


@pytest.mark.parametrize("tuning", FAMILIES, ids=lambda tuning: tuning.family)
def test_every_family_multiplies_long_rows(tuning: Tuning) -> None:
    """One vector of 14336 columns leaves room for chunks; tables lie where masks find them."""
    gpu = typical_gpu(tuning)
    for columns, raw in ((4096, True), (14336, False), (14336, True)):
        limit = chunk_limit(gpu, columns, raw)
        plan = plan_of(gpu, 1, columns, raw, limit)
        assert limit >= 2 << 10 and plan.slots >= tuning.wanted_slots
        assert plan.end_bytes <= gpu.block_bytes == tuning.multiprocessor_bytes - 1024
        assert plan.table.begin % (layout.TABLE_BYTES * plan.table.copies) == 0
        activations = plan.triple_bytes + plan.raw_bytes
        taken = plan.slot_bytes * plan.front_slots + (activations if plan.in_front else 0)
        assert taken <= plan.table.begin - 1024 - plan.table.state_bytes


def test_launches_of_a_batch() -> None:
    """With raw bits, several launches of four vectors; large matrices take more of them before they are decoded."""
    rng = np.random.default_rng(0)
    steps = {}
    for deviation in (0.5, 3.0):
        symbols = torch.from_numpy(np.clip(np.rint(rng.normal(128, deviation, (32, 2048))), 0, 255).astype(np.uint8))
        matrix = CudaMatrix([transcode("tensor", symbols, torch.ones(1))], torch.device("cpu"))
        steps[deviation] = [matrix.launch_vectors(batch) for batch in (0, 1, 4, 5, 8, 9)]
        matrix.shape = (1 << 15, 2048)
        assert [matrix.launch_vectors(batch) for batch in (9, 12, 13)] == [3, 4, 0]
    assert steps[0.5] == [8, 8, 8, 8, 8, 0]
    assert steps[3.0] == [1, 1, 4, 3, 4, 0]
