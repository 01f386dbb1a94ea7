// Decodes a matrix, or some of its rows, to memory. Every warp decodes and writes segments of its
// own. The compiler defines SLOTS, the slots for chunks, and what common.cuh needs; STATE_BYTES is
// the room for State.
#include "ring.cuh"

namespace {

constexpr int kSlots = SLOTS;
constexpr int kWarps = THREADS / kLanes;
constexpr int kPieces = kSpanColumns / kPieceColumns;  // of a row
constexpr int kTurns = (kTileRows * kPieces + kLanes - 1) / kLanes;
constexpr int kRowsBytes = kTileRows * sizeof(Row);

struct Launch {
  Matrix matrix;
  const long long* rows;  // rows to decode, each within the matrix; null for all
  const int* positions;   // of each row of the matrix among the rows of all tiles
  void* out;              // (rows, columns)
  int items;              // tiles, or rows to decode
  int columns;
  int type;  // of out: 0 float32, 1 bfloat16, 2 float16
  Divisor slots;
  int slot_bytes;
};

struct State {
  Ring<kSlots> ring;
  Row rows[kSlots][kTileRows];  // of the tile that the chunk in a slot belongs to
  // A span's symbols, to bring them from the order of decoding to that of columns.
  u8 stage[kWarps][kTileRows * kSpanColumns];
};

static_assert(sizeof(State) <= STATE_BYTES, "plans of shared memory must leave room for it");

// The table's entry for a chunk, and the one for the first chunk of its tile.
struct StoredChunk {
  uint4 first;
  uint4 self;
};

__device__ __forceinline__ StoredChunk from_lane(const StoredChunk& value, int lane) {
  return {from_lane(value.first, lane), from_lane(value.self, lane)};
}

// The raw words of a chunk.
struct Raw {
  const u32* words;
  int bits;
  int units;
  int left;  // number of the first unit

  // Adds the raw bits of the eight neighbours from column `column` of row `row` of the chunk's tile
  // to their bytes, modulo 256.
  __device__ __forceinline__ void add(int row, int column, uint2& bytes) const {
    const int inside = column % kUnitColumns;
    const int lane = row % 8 * 4 + inside / 4 % 4;
    const int index = inside / 32 * 4 + inside / 16 % 2 * 2 + row / 8;
    const int unit = column / kUnitColumns - left;
    const u32* set = words + lane;
    uint2 raw = make_uint2(0, 0);
#pragma unroll
    for (int width = 4; width > 0; width /= 2) {
      if ((bits & width) == 0) continue;
      const int per_word = 8 / width;
      const uint2 both =
          *reinterpret_cast<const uint2*>(set + (unit * width + index / per_word) * kLanes);
      const u32 mask = ((1u << width) - 1) * 0x01010101u;
      const int right = 8 - width * (index % per_word + 1);
      const int up = bits & (width - 1);
      raw.x += (both.x >> right & mask) << up;
      raw.y += (both.y >> right & mask) << up;
      set += units * width * kLanes;
    }
    bytes.x = __vadd4(bytes.x, raw.x);
    bytes.y = __vadd4(bytes.y, raw.y);
  }
};

// Decodes one span to the stage, as bytes in the order of columns.
__device__ __forceinline__ void stage_span(Stream (&streams)[kStreams], u8* stage) {
  const int lane = threadIdx.x % kLanes;
  const int quarter = lane % 4;
  // Four lanes hold three neighbours each. Three of the lanes assemble a word from their own and
  // the next lane's.
  const u32 order = quarter == 0 ? 0x5321u : quarter == 1 ? 0x6532u : 0x7653u;
  u32 entries[kStreams][kSpanTriples];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) streams[s].entries(entries[s] + half * 3);
  }
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    u32* to = reinterpret_cast<u32*>(stage + (lane / 4 + s * 8) * kSpanColumns) + quarter;
#pragma unroll
    for (int i = 0; i < kSpanTriples; ++i) {
      const u32 next = __shfl_down_sync(~0u, entries[s][i], 1);
      const u32 word = __byte_perm(entries[s][i], next, order);
      if (quarter < 3) to[i * 3] = word;
    }
  }
}

// The patches of a chunk, in the order of spans.
struct Patches {
  const u32* next;
  const u32* end;

  __device__ __forceinline__ static int step(u32 patch) { return static_cast<int>(patch >> 18); }

  // Skips the patches of spans before `span`.
  __device__ __forceinline__ void skip(int span) {
    const int lane = threadIdx.x % kLanes;
    int before = 0;
    for (const u32* at = next + lane; at < end; at += kLanes) before += step(*at) < span * 3;
    next += __reduce_add_sync(~0u, before);
  }

  // Patches the symbols of a span in the stage.
  __device__ __forceinline__ void apply(int span, u8* stage) {
    const int lane = threadIdx.x % kLanes;
    for (;;) {
      const u32* at = next + lane;
      const u32 patch = at < end ? *at : ~0u;
      const bool here = step(patch) < span * 3 + 3;
      if (here) {
        const int inside = patch >> 13 & 31;
        const int column = (step(patch) - span * 3) * kStepColumns + inside / 4 % 2 * 12 +
                           inside / 8 * 3 + inside % 4 - 1;
        // Bytes are added modulo 256, so a negative difference needs no special case.
        stage[(patch & 15) * kSpanColumns + column] += static_cast<u8>((patch >> 4 & 511) - 256);
      }
      const int count = __popc(__ballot_sync(~0u, here));
      next += count;
      if (count < kLanes) break;
    }
  }
};

// The pieces of a tile that a lane writes.
struct Pieces {
  float scale[kTurns];
  float offset[kTurns];
  long long begin[kTurns];  // in bytes, from the column of a span in the first row of the output
};

// Writes a span from the stage; all of its columns and rows must exist.
template <int kType>
__device__ __forceinline__ void write_span(u8* out, const Pieces& pieces, const Raw& raw, int span,
                                           const u8* stage) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * kLanes + lane;
    if (i >= kTileRows * kPieces) break;
    uint2 bytes = reinterpret_cast<const uint2*>(stage)[i];
    if (raw.bits != 0) {
      raw.add(i / kPieces, span * kSpanColumns + i % kPieces * kPieceColumns, bytes);
    }
    float values[kPieceColumns];
    scale_piece(bytes, pieces.scale[turn], pieces.offset[turn], values);
    store_piece<kType>(out + pieces.begin[turn], values);
  }
}

// Writes the existing part of a span, one weight after another. `only` is the one row of the tile
// to write, to row `item` of the output, or negative to write all rows.
__device__ __forceinline__ void write_edge(const Launch& launch, const Row* rows, int count,
                                           int only, int item, const Raw& raw, int span,
                                           const u8* stage) {
  const Matrix& matrix = launch.matrix;
#pragma unroll 1
  for (int i = threadIdx.x % kLanes; i < (only < 0 ? count : 1) * kPieces; i += kLanes) {
    const int r = only < 0 ? i / kPieces : only;
    const int piece = i % kPieces * kPieceColumns;
    const int column = span * kSpanColumns + piece;
    if (column >= launch.columns) continue;
    uint2 bytes = *reinterpret_cast<const uint2*>(stage + r * kSpanColumns + piece);
    if (raw.bits != 0) raw.add(r, column, bytes);
    float values[kPieceColumns];
    scale_piece(bytes, rows[r].scale, rows[r].offset, values);
    const long long begin =
        (only < 0 ? rows[r].index : item) * static_cast<long long>(launch.columns) + column;
#pragma unroll
    for (int t = 0; t < kPieceColumns; ++t) {
      if (column + t >= launch.columns) break;
      if (matrix.column_scale != nullptr) values[t] *= __ldg(&matrix.column_scale[column + t]);
      store_value(launch.out, begin + t, values[t], launch.type);
    }
  }
}

// Decodes one segment of a chunk and writes it; `only` and `item` are those of write_edge.
template <int kType>
__device__ __forceinline__ void decode_segment(const Launch& launch, State& state, const u8* data,
                                               const Position& at, int tile, int only, int item) {
  constexpr int kSize = kType == 0 ? 4 : 2;
  const Matrix& matrix = launch.matrix;
  const int lane = threadIdx.x % kLanes;
  const uint4 stored = state.ring.wait(at);
  const u8* tail = data + stored.z;
  const u16* bounds = state.ring.bounds + at.in_tile * matrix.segments;
  const int begin = bounds[at.segment];
  const int end = bounds[at.segment + 1];
  Stream streams[kStreams] = {
      {data, segment_start(tail, at.segment, 0, lane)},
      {data + (stored.w >> 16) * kWordRowBytes, segment_start(tail, at.segment, 1, lane)}};
  Raw raw{chunk_words(tail, matrix.segments, at.in_tile == 0), matrix.raw_bits, 0,
          first_unit(bounds[0] * kSpanColumns)};
  raw.units = end_unit(min(bounds[matrix.segments] * kSpanColumns, launch.columns)) - raw.left;
  Patches patches{raw.words + raw.units * raw.bits * kLanes, nullptr};
  patches.end = patches.next + (stored.w & 0xffff);
  patches.skip(begin);

  const Row* rows = state.rows[at.slot];
  const int count = min(kTileRows, matrix.rows - tile * kTileRows);
  const bool simple = only < 0 && count == kTileRows && launch.columns % kPieceColumns == 0 &&
                      matrix.column_scale == nullptr;
  Pieces pieces;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = min(turn * kLanes + lane, kTileRows * kPieces - 1);
    const Row row = rows[i / kPieces];
    pieces.scale[turn] = row.scale;
    pieces.offset[turn] = row.offset;
    pieces.begin[turn] =
        (row.index * static_cast<long long>(launch.columns) + i % kPieces * kPieceColumns) * kSize;
  }
  u8* stage = state.stage[threadIdx.x / kLanes];
  u8* out = static_cast<u8*>(launch.out) + begin * kSpanColumns * kSize;
  for (int span = begin; span < end; ++span) {
    stage_span(streams, stage);
    __syncwarp();
    patches.apply(span, stage);
    __syncwarp();
    if (simple && (span + 1) * kSpanColumns <= launch.columns) {
      write_span<kType>(out, pieces, raw, span, stage);
    } else {
      write_edge(launch, rows, count, only, item, raw, span, stage);
    }
    out += kSpanColumns * kSize;
    __syncwarp();
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(16) State state;
  const Matrix& matrix = launch.matrix;
  u8* table = table_in(memory);
  const auto slot_data = [&](int slot) { return table + kTableBytes + slot * launch.slot_bytes; };
  const int block = blockIdx.x;
  const int items =
      block < launch.items ? (launch.items - 1 - block) / static_cast<int>(gridDim.x) + 1 : 0;
  const int chunks = items * matrix.tile_chunks;
  const auto item_of = [&](int i) { return block + i * static_cast<int>(gridDim.x); };
  // The position, among the rows of all tiles, of an item's row or of the first row of its tile.
  const auto position_of = [&](int i) {
    return launch.rows == nullptr ? item_of(i) * kTileRows
                                  : launch.positions[launch.rows[item_of(i)]];
  };
  const auto stored_chunk = [&](int chunk) {
    if (chunk >= chunks) return StoredChunk{};
    const int i = matrix.tile_chunks.divide(chunk);
    const uint4* first = &matrix.chunks[position_of(i) / kTileRows * matrix.tile_chunks];
    return StoredChunk{__ldg(first), __ldg(first + chunk - i * matrix.tile_chunks)};
  };
  const auto fetch = [&](int slot, const StoredChunk& chunk) {
    const u8* rows = matrix.data + static_cast<u64>(chunk.first.x) * 16 + chunk.first.z;
    copy_more(state.rows[slot], tile_rows(rows, matrix.segments), kRowsBytes,
              &state.ring.barriers[slot]);
    state.ring.fetch(slot, slot_data(slot), matrix, chunk.self);
  };
  const TableCopies copies(matrix.table);
  if (threadIdx.x < launch.slots) state.ring.open(threadIdx.x);
  __syncthreads();
  if (threadIdx.x < kLanes) {
    fetch_first(0, min(launch.slots, chunks), stored_chunk(threadIdx.x), fetch);
  }
  const int bound_count = matrix.tile_chunks * matrix.segments + 1;
  if (threadIdx.x < bound_count)
    state.ring.bounds[threadIdx.x] = __ldg(&matrix.bounds[threadIdx.x]);
  copies.store(table, (matrix.base & 255) * 0x01010100u);
  __syncthreads();
  for (int share = threadIdx.x / kLanes; share < chunks * matrix.segments; share += kWarps) {
    const Position at(share, matrix, launch.slots);
    const int ahead = at.chunk + launch.slots;
    const StoredChunk next = stored_chunk(ahead);
    const int position = position_of(at.tile);
    const int only = launch.rows == nullptr ? -1 : position % kTileRows;
    const u8* data = slot_data(at.slot);
    const int tile = position / kTileRows;
    if (launch.type == 0) {
      decode_segment<0>(launch, state, data, at, tile, only, item_of(at.tile));
    } else if (launch.type == 1) {
      decode_segment<1>(launch, state, data, at, tile, only, item_of(at.tile));
    } else {
      decode_segment<2>(launch, state, data, at, tile, only, item_of(at.tile));
    }
    const bool wanted =
        threadIdx.x % kLanes == 0 && state.ring.release(at, matrix.segments) && ahead < chunks;
    fetch_next(wanted, [&] { fetch(at.slot, next); });
  }
}
