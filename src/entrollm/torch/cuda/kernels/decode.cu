// Decodes a matrix to memory, or single rows of it; every warp decodes and writes segments of its
// own.
#include "ring.cuh"

namespace {

constexpr int kSlots = 8;
constexpr int kWarps = THREADS / kLanes;
// Neighbours that a lane converts and writes at a time.
constexpr int kPieceColumns = 8;
constexpr int kPieces = kGroupColumns / kPieceColumns;  // of a row
constexpr int kTurns = (kTileRows * kPieces + kLanes - 1) / kLanes;
constexpr int kRowsBytes = kTileRows * sizeof(Row);

struct Launch {
  Matrix matrix;
  const long long* rows;  // rows to decode, each within the matrix; null for all
  const int* places;      // where each row of the matrix lies among the tiles
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
  // A group's symbols on their way from the order of decoding to that of columns.
  u8 stage[kWarps][kTileRows * kGroupColumns];
};

// A chunk's entry in the table of chunks, and that of its tile's first chunk.
struct StoredChunk {
  uint4 first;
  uint4 self;
};

// Weights of eight neighbours: symbol * scale, rounded, + offset.
__device__ __forceinline__ void scale_piece(uint2 bytes, float scale, float offset,
                                            float (&values)[kPieceColumns]) {
  constexpr float kLift = 8388608.0f;
  // 2^23 + byte is put together from bits; taking 2^23 scales off it again leaves one rounding.
  const float lifted = -kLift * scale;
#pragma unroll
  for (int i = 0; i < kPieceColumns; ++i) {
    const u32 bits =
        __byte_perm(i < 4 ? bytes.x : bytes.y, __float_as_uint(kLift), 0x7440u + i % 4);
    values[i] = __fadd_rn(__fmaf_rn(__uint_as_float(bits), scale, lifted), offset);
  }
}

// Stores eight neighbours, the first at a multiple of eight, past the first-level cache.
template <int kType>
__device__ __forceinline__ void store_piece(u8* out, const float (&values)[kPieceColumns]) {
  uint4* to = reinterpret_cast<uint4*>(out);
  if constexpr (kType == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      __stcs(to + i,
             make_uint4(__float_as_uint(values[4 * i]), __float_as_uint(values[4 * i + 1]),
                        __float_as_uint(values[4 * i + 2]), __float_as_uint(values[4 * i + 3])));
    }
  } else {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType == 1) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
            : "=r"(words[i])
            : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;"
            : "=r"(words[i])
            : "f"(values[2 * i + 1]), "f"(values[2 * i]));
      }
    }
    __stcs(to, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// A chunk's raw words and where they belong.
struct Raw {
  const u32* words;
  int bits;
  int units;
  int left;  // the first unit

  // Adds the raw bits of the eight neighbours from column `column` of row `row` of the chunk's tile
  // to their bytes, modulo 256.
  __device__ __forceinline__ void add(int row, int column, uint2& bytes) const {
    const int inside = column % kUnitColumns;
    const int lane = row % 8 * 4 + inside / 4 % 4;
    const int place = inside / 32 * 4 + inside / 16 % 2 * 2 + row / 8;
    const int unit = column / kUnitColumns - left;
    const u32* set = words + lane;
    uint2 raw = make_uint2(0, 0);
#pragma unroll
    for (int width = 4; width > 0; width /= 2) {
      if ((bits & width) == 0) continue;
      const int per_word = 8 / width;
      const uint2 both =
          *reinterpret_cast<const uint2*>(set + (unit * width + place / per_word) * kLanes);
      const u32 mask = ((1u << width) - 1) * 0x01010101u;
      const int right = 8 - width * (place % per_word + 1);
      const int up = bits & (width - 1);
      raw.x += (both.x >> right & mask) << up;
      raw.y += (both.y >> right & mask) << up;
      set += units * width * kLanes;
    }
    bytes.x = __vadd4(bytes.x, raw.x);
    bytes.y = __vadd4(bytes.y, raw.y);
  }
};

// Decodes one group to the stage, as bytes in the order of columns.
__device__ __forceinline__ void stage_group(Stream (&streams)[kStreams], u8* stage) {
  const int lane = threadIdx.x % kLanes;
  const int quarter = lane % 4;
  // Four lanes have three neighbours each; three of them make words of their own and the next
  // lane's.
  const u32 order = quarter == 0 ? 0x5321u : quarter == 1 ? 0x6532u : 0x7653u;
  u32 entries[kStreams][kGroupTriples];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int s = 0; s < kStreams; ++s) streams[s].entries(entries[s] + half * 3);
  }
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    u32* to = reinterpret_cast<u32*>(stage + (lane / 4 + s * 8) * kGroupColumns) + quarter;
#pragma unroll
    for (int i = 0; i < kGroupTriples; ++i) {
      const u32 next = __shfl_down_sync(~0u, entries[s][i], 1);
      const u32 word = __byte_perm(entries[s][i], next, order);
      if (quarter < 3) to[i * 3] = word;
    }
  }
}

// Patches of a segment, in the order of groups.
struct Patches {
  const u32* next;
  const u32* end;

  __device__ __forceinline__ static int step(u32 patch) { return static_cast<int>(patch >> 18); }

  // Leaves out those of groups before the segment's.
  __device__ __forceinline__ void skip(int group) {
    const int lane = threadIdx.x % kLanes;
    int before = 0;
    for (const u32* at = next + lane; at < end; at += kLanes) before += step(*at) < group * 3;
    next += __reduce_add_sync(~0u, before);
  }

  // Patches what the stage holds of a group.
  __device__ __forceinline__ void apply(int group, u8* stage) {
    const int lane = threadIdx.x % kLanes;
    for (;;) {
      const u32* at = next + lane;
      const u32 patch = at < end ? *at : ~0u;
      const bool here = step(patch) < group * 3 + 3;
      if (here) {
        const int inside = patch >> 13 & 31;
        const int column = (step(patch) - group * 3) * kStepColumns + inside / 4 % 2 * 12 +
                           inside / 8 * 3 + inside % 4 - 1;
        // Differences are taken modulo 256, as bytes add.
        stage[(patch & 15) * kGroupColumns + column] += static_cast<u8>((patch >> 4 & 511) - 256);
      }
      const int count = __popc(__ballot_sync(~0u, here));
      next += count;
      if (count < kLanes) break;
    }
  }
};

// Where the pieces of a tile go that a lane writes.
struct Pieces {
  float scale[kTurns];
  float offset[kTurns];
  long long begin[kTurns];  // in bytes, from the column of a group in the first row of the output
};

// Writes a group that the stage holds, all of whose columns and rows there are.
template <int kType>
__device__ __forceinline__ void write_group(u8* out, const Pieces& pieces, const Raw& raw,
                                            int group, const u8* stage) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * kLanes + lane;
    if (i >= kTileRows * kPieces) break;
    uint2 bytes = reinterpret_cast<const uint2*>(stage)[i];
    if (raw.bits != 0) {
      raw.add(i / kPieces, group * kGroupColumns + i % kPieces * kPieceColumns, bytes);
    }
    float values[kPieceColumns];
    scale_piece(bytes, pieces.scale[turn], pieces.offset[turn], values);
    store_piece<kType>(out + pieces.begin[turn], values);
  }
}

// Writes any group, or what there is of it, one weight after another. `only` is the row of the tile
// to write, which goes to row `item` of the output, or negative for all.
__device__ __forceinline__ void write_edge(const Launch& launch, const Row* rows, int count,
                                           int only, int item, const Raw& raw, int group,
                                           const u8* stage) {
  const Matrix& matrix = launch.matrix;
#pragma unroll 1
  for (int i = threadIdx.x % kLanes; i < (only < 0 ? count : 1) * kPieces; i += kLanes) {
    const int r = only < 0 ? i / kPieces : only;
    const int piece = i % kPieces * kPieceColumns;
    const int column = group * kGroupColumns + piece;
    if (column >= launch.columns) continue;
    uint2 bytes = *reinterpret_cast<const uint2*>(stage + r * kGroupColumns + piece);
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

// Decodes one segment of a chunk and writes it out; `only` and `item` as for write_edge.
template <int kType>
__device__ __forceinline__ void decode_segment(const Launch& launch, State& state, const u8* table,
                                               const u8* data, const Place& at, int tile, int only,
                                               int item) {
  constexpr int kSize = kType == 0 ? 4 : 2;
  const Matrix& matrix = launch.matrix;
  const int lane = threadIdx.x % kLanes;
  const uint4 stored = state.ring.wait(at);
  const u8* tail = data + stored.z;
  const u16* bounds = state.ring.bounds + at.in_tile * matrix.segments;
  const int begin = bounds[at.segment];
  const int end = bounds[at.segment + 1];
  Stream streams[kStreams] = {
      {table, data, segment_start(tail, at.segment, 0, lane)},
      {table, data + (stored.w >> 16) * kWordRowBytes, segment_start(tail, at.segment, 1, lane)}};
  Raw raw{chunk_words(tail, matrix.segments, at.in_tile == 0), matrix.raw_bits, 0,
          first_unit(bounds[0] * kGroupColumns)};
  raw.units = end_unit(min(bounds[matrix.segments] * kGroupColumns, launch.columns)) - raw.left;
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
  u8* out = static_cast<u8*>(launch.out) + begin * kGroupColumns * kSize;
  for (int group = begin; group < end; ++group) {
    stage_group(streams, stage);
    __syncwarp();
    patches.apply(group, stage);
    __syncwarp();
    if (simple && (group + 1) * kGroupColumns <= launch.columns) {
      write_group<kType>(out, pieces, raw, group, stage);
    } else {
      write_edge(launch, rows, count, only, item, raw, group, stage);
    }
    out += kGroupColumns * kSize;
    __syncwarp();
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ __align__(16) State state;
  const Matrix& matrix = launch.matrix;
  u8* table = table_place(memory);
  const auto slot_place = [&](int slot) { return table + kTableBytes + slot * launch.slot_bytes; };
  const int block = blockIdx.x;
  const int items =
      block < launch.items ? (launch.items - 1 - block) / static_cast<int>(gridDim.x) + 1 : 0;
  const int chunks = items * matrix.tile_chunks;
  const auto item_of = [&](int i) { return block + i * static_cast<int>(gridDim.x); };
  // The place of an item's row among the tiles, or of its tile's first row.
  const auto place_of = [&](int i) {
    return launch.rows == nullptr ? item_of(i) * kTileRows : launch.places[launch.rows[item_of(i)]];
  };
  const auto stored_chunk = [&](int chunk) {
    if (chunk >= chunks) return StoredChunk{};
    const int i = matrix.tile_chunks.divide(chunk);
    const uint4* first = &matrix.chunks[place_of(i) / kTileRows * matrix.tile_chunks];
    return StoredChunk{__ldg(first), __ldg(first + chunk - i * matrix.tile_chunks)};
  };
  const auto fetch = [&](int slot, const StoredChunk& chunk) {
    const u8* rows = matrix.data + static_cast<u64>(chunk.first.x) * 16 + chunk.first.z;
    copy_more(state.rows[slot], tile_rows(rows, matrix.segments), kRowsBytes,
              &state.ring.barriers[slot]);
    state.ring.fetch(slot, slot_place(slot), matrix, chunk.self);
  };
  const TableCopies copies(matrix.table);
  if (threadIdx.x < launch.slots) state.ring.open(threadIdx.x);
  __syncthreads();
  if (threadIdx.x < min(launch.slots, chunks)) fetch(threadIdx.x, stored_chunk(threadIdx.x));
  const int bound_count = matrix.tile_chunks * matrix.segments + 1;
  if (threadIdx.x < bound_count)
    state.ring.bounds[threadIdx.x] = __ldg(&matrix.bounds[threadIdx.x]);
  copies.store(table, (matrix.base & 255) * 0x01010100u);
  __syncthreads();
  for (int share = threadIdx.x / kLanes; share < chunks * matrix.segments; share += kWarps) {
    const Place at(share, matrix, launch.slots);
    const int ahead = at.chunk + launch.slots;
    const StoredChunk next = stored_chunk(ahead);
    const int place = place_of(at.tile);
    const int only = launch.rows == nullptr ? -1 : place % kTileRows;
    const u8* data = slot_place(at.slot);
    const int tile = place / kTileRows;
    if (launch.type == 0) {
      decode_segment<0>(launch, state, table, data, at, tile, only, item_of(at.tile));
    } else if (launch.type == 1) {
      decode_segment<1>(launch, state, table, data, at, tile, only, item_of(at.tile));
    } else {
      decode_segment<2>(launch, state, table, data, at, tile, only, item_of(at.tile));
    }
    if (threadIdx.x % kLanes == 0 && state.ring.release(at, matrix.segments) && ahead < chunks) {
      fetch(at.slot, next);
    }
    __syncwarp();
  }
}
