// Decodes a matrix to memory, or single rows of it; every warp decodes and writes segments of its
// own.
#include "ring.cuh"

namespace {

constexpr int kSlots = 8;
// A group's symbols on their way from the order of decoding to that of columns: bytes of a row; 4
// more than there are, so that rows begin in different banks.
constexpr int kStageColumns = kGroupColumns + 4;
constexpr int kQuads = kGroupColumns / 4;
constexpr int kWarps = THREADS / kLanes;

struct Launch {
  Matrix matrix;
  const long long* rows;  // rows to decode, each within the matrix; null for all
  const int* places;      // where each row of the matrix lies among the tiles
  void* out;              // (rows, columns)
  int items;              // tiles, or rows to decode
  int columns;
  int type;  // of out: 0 float32, 1 bfloat16, 2 float16
  int slots;
  int slot_bytes;
};

struct State {
  Ring<kSlots> ring;
  u8 stage[kWarps][kTileRows * kStageColumns];
};

// The exact float of byte `i` of a word: 2^23 + byte, put together from bits, less 2^23.
__device__ __forceinline__ float byte_to_float(u32 word, int i) {
  return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u + i)) - 8388608.0f;
}

// Stores four neighbours, the first at a multiple of four.
template <int kType>
__device__ __forceinline__ void store_four(void* out, long long at, const float (&values)[4]) {
  if constexpr (kType == 0) {
    *reinterpret_cast<float4*>(static_cast<float*>(out) + at) =
        make_float4(values[0], values[1], values[2], values[3]);
  } else {
    u32 words[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
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
    *reinterpret_cast<uint2*>(static_cast<u16*>(out) + at) = make_uint2(words[0], words[1]);
  }
}

// The raw bits of four neighbours, as bytes; the first is column `column` of row `row` of the
// chunk's tile.
__device__ __forceinline__ u32 raw_bytes(const u32* words, int raw_bits, int units, int left,
                                         int row, int column) {
  const int unit = column / kUnitColumns - left;
  const int inside = column % kUnitColumns;
  const int lane = row % 8 * 4 + inside / 4 % 4;
  const int place = inside / 32 * 4 + inside / 16 % 2 * 2 + row / 8;
  u32 raw = 0;
#pragma unroll
  for (int bits = 4; bits > 0; bits /= 2) {
    if ((raw_bits & bits) == 0) continue;
    const int per_word = 8 / bits;
    const u32 word = words[(unit * bits + place / per_word) * kLanes + lane];
    const u32 mask = ((1u << bits) - 1) * 0x01010101u;
    raw += ((word >> (8 - bits * (place % per_word + 1))) & mask) << (raw_bits & (bits - 1));
    words += units * bits * kLanes;
  }
  return raw;
}

// Decodes one group to the stage, patched.
__device__ __forceinline__ void stage_group(Stream (&streams)[kStreams], const u32* patches,
                                            int patch_count, int group, u8* stage) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    u32 entries[kGroupTriples];
    streams[s].entries(entries);
    streams[s].entries(entries + 3);
    u8* to = stage + (lane / 4 + s * 8) * kStageColumns + lane % 4 * kTripleColumns;
#pragma unroll
    for (int i = 0; i < kGroupTriples; ++i) {
#pragma unroll
      for (int t = 0; t < 3; ++t) to[i * 12 + t] = static_cast<u8>(entries[i] >> (8 * t + 8));
    }
  }
  __syncwarp();
  for (int i = lane; i < patch_count; i += kLanes) {
    const u32 patch = patches[i];
    const int step = static_cast<int>(patch >> 18) - group * 3;
    if (step < 0 || step >= 3) continue;
    const int inside = patch >> 13 & 31;
    const int column = step * kStepColumns + inside / 4 % 2 * 12 + inside / 8 * 3 + inside % 4 - 1;
    // Differences are taken modulo 256, as bytes add.
    stage[(patch & 15) * kStageColumns + column] += static_cast<u8>((patch >> 4 & 511) - 256);
  }
  __syncwarp();
}

// A chunk's raw words and where they belong.
struct Raw {
  const u32* words;
  int units;
  int left;  // the first unit
};

// Writes what lies in the stage: four lanes take 16 neighbours of rows lane / 4 and lane / 4 + 8 at
// a time.
template <int kType>
__device__ __forceinline__ void write_group(const Launch& launch, const Raw& raw,
                                            const Row (&rows)[kStreams],
                                            const long long (&begins)[kStreams], int group,
                                            const u8* stage) {
  const Matrix& matrix = launch.matrix;
  const int lane = threadIdx.x % kLanes;
  const int left = group * kGroupColumns;
  const u32 base = (matrix.base & 255) * 0x01010101u;
  const bool simple = left + kGroupColumns <= launch.columns && launch.columns % 4 == 0;
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    if (begins[s] < 0) continue;
    const int r = lane / 4 + s * 8;
#pragma unroll
    for (int turn = 0; turn < (kQuads + 3) / 4; ++turn) {
      const int quad = turn * 4 + lane % 4;
      const int column = left + quad * 4;
      if (quad >= kQuads || column >= launch.columns) continue;
      u32 symbols = *reinterpret_cast<const u32*>(stage + r * kStageColumns + quad * 4);
      if (matrix.raw_bits != 0) {
        symbols =
            __vadd4(symbols, raw_bytes(raw.words, matrix.raw_bits, raw.units, raw.left, r, column));
      }
      symbols = __vadd4(symbols, base);
      float values[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        values[t] = __fadd_rn(__fmul_rn(byte_to_float(symbols, t), rows[s].scale), rows[s].offset);
        if (matrix.column_scale != nullptr) values[t] *= matrix.column_scale[column + t];
      }
      if (simple) {
        store_four<kType>(launch.out, begins[s] + column, values);
      } else {
        for (int t = 0; t < min(4, launch.columns - column); ++t) {
          store_value(launch.out, begins[s] + column + t, values[t], kType);
        }
      }
    }
  }
}

// Decodes one segment of a chunk and writes it out; `item` is the tile, or the row to decode.
__device__ __forceinline__ void decode_segment(const Launch& launch, State& state, const u8* table,
                                               const u8* data, const Place& at, int tile,
                                               int item) {
  const Matrix& matrix = launch.matrix;
  const int lane = threadIdx.x % kLanes;
  const uint4 head = __ldg(&matrix.chunks[tile * matrix.tile_chunks]);
  const Row* stored_rows =
      tile_rows(matrix.data + static_cast<u64>(head.x) * 16 + head.z, matrix.segments);
  const bool all = launch.rows == nullptr;
  const int only = all ? -1 : launch.places[launch.rows[item]] % kTileRows;
  Row rows[kStreams];
  long long begins[kStreams];  // of the rows in the output; negative for rows that are not written
#pragma unroll
  for (int s = 0; s < kStreams; ++s) {
    const int r = lane / 4 + s * 8;
    rows[s] = stored_rows[r];
    const bool wanted = tile * kTileRows + r < matrix.rows && (all || r == only);
    begins[s] = wanted ? (all ? rows[s].index : item) * static_cast<long long>(launch.columns) : -1;
  }
  const uint4 stored = state.ring.wait(at);
  const u8* tail = data + stored.z;
  const u16* bounds = state.ring.bounds + at.in_tile * matrix.segments;
  Stream streams[kStreams] = {
      {table, data, segment_start(tail, at.segment, 0, lane)},
      {table, data + (stored.w >> 16) * kWordRowBytes, segment_start(tail, at.segment, 1, lane)}};
  Raw raw{chunk_words(tail, matrix.segments, at.in_tile == 0), 0,
          first_unit(bounds[0] * kGroupColumns)};
  raw.units = end_unit(min(bounds[matrix.segments] * kGroupColumns, launch.columns)) - raw.left;
  const u32* patches = raw.words + raw.units * matrix.raw_bits * kLanes;
  u8* stage = state.stage[threadIdx.x / kLanes];
  for (int group = bounds[at.segment]; group < bounds[at.segment + 1]; ++group) {
    stage_group(streams, patches, stored.w & 0xffff, group, stage);
    if (launch.type == 0) {
      write_group<0>(launch, raw, rows, begins, group, stage);
    } else if (launch.type == 1) {
      write_group<1>(launch, raw, rows, begins, group, stage);
    } else {
      write_group<2>(launch, raw, rows, begins, group, stage);
    }
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
  const Divisors by{Divisor(matrix.segments), Divisor(launch.slots), Divisor(matrix.tile_chunks)};
  const auto item_of = [&](int i) { return block + i * static_cast<int>(gridDim.x); };
  const auto tile_of = [&](int i) {
    return launch.rows == nullptr ? item_of(i) : launch.places[launch.rows[item_of(i)]] / kTileRows;
  };
  const auto stored_chunk = [&](int chunk) {
    if (chunk >= chunks) return make_uint4(0, 0, 0, 0);
    const int i = by.chunks.divide(chunk);
    return __ldg(&matrix.chunks[tile_of(i) * matrix.tile_chunks + chunk - i * matrix.tile_chunks]);
  };
  if (threadIdx.x < launch.slots) state.ring.open(threadIdx.x);
  __syncthreads();
  if (threadIdx.x < min(launch.slots, chunks)) {
    state.ring.fetch(threadIdx.x, slot_place(threadIdx.x), matrix, stored_chunk(threadIdx.x));
  }
  const int bound_count = matrix.tile_chunks * matrix.segments + 1;
  if (threadIdx.x < bound_count)
    state.ring.bounds[threadIdx.x] = __ldg(&matrix.bounds[threadIdx.x]);
  spread_table(table, matrix.table);
  __syncthreads();
  for (int share = threadIdx.x / kLanes; share < chunks * matrix.segments; share += kWarps) {
    const Place at(share, 1, by);
    const int ahead = at.chunk + launch.slots;
    const uint4 next = stored_chunk(ahead);
    decode_segment(launch, state, table, slot_place(at.slot), at, tile_of(at.tile),
                   item_of(at.tile));
    __syncwarp();
    if (threadIdx.x % kLanes == 0 && state.ring.release(at, matrix.segments) && ahead < chunks) {
      state.ring.fetch(at.slot, slot_place(at.slot), matrix, next);
    }
    __syncwarp();
  }
}
