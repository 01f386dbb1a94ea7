// What products with coded matrices share. Each chunk is copied to shared memory, decoded to
// registers, and multiplied by the matrix unit; no decoded weight is ever written to memory. The
// compiler defines BATCH, TYPE of x and y (0 float32, 1 bfloat16, 2 float16), THREADS, BLOCKS of a
// multiprocessor, SLOTS for chunks, OPEN_TILES, and what common.cuh needs; STATE_BYTES is the room
// for static shared memory.
#pragma once

#include "matrix_unit.cuh"
#include "ring.cuh"

namespace {

constexpr int kMaxSlots = SLOTS;
// Tiles that can be in progress at once.
constexpr int kOpenTiles = OPEN_TILES;
static_assert(kMaxSlots <= kLanes, "the last warp requests a chunk per lane");

// Threads that round x: all but those of the last warp, which requests chunks.
constexpr int kRounding = THREADS - kLanes;

struct Launch {
  Matrix matrices[kMaxMatrices];
  const void* x;
  void* y;
  int count;
  int columns;  // a multiple of 4; x has zeros where the matrix has no column
  int y_stride;
  Divisor slots;
  int slot_bytes;
  int triple_bytes;  // activations in the order of triples
  int raw_bytes;     // activations in the order of raw units, or 0
  int in_front;      // 1 if activations are in front of the table and all slots behind it
  int front_slots;   // slots in front of the table if activations are behind it
  int early;  // chunks to request before the previous kernel has ended; with more, x comes late
};

// Static shared memory.
struct State {
  Row rows[kOpenTiles][kTileRows];
  int sums[kOpenTiles][kTileRows][kBatch][2];
  u32 tile_done[kOpenTiles];    // shares that are in the sums
  u32 tile_rounds[kOpenTiles];  // tiles that used the place before
  Ring<kMaxSlots> ring;
  Rounded rounded;
};

static_assert(sizeof(State) <= STATE_BYTES, "plans of shared memory must leave room for it");

struct Dynamic {
  u8* triples;
  u8* raws;
  u8* front;  // slots in front of the table
  u8* back;   // slots behind it

  __device__ __forceinline__ u8* slot(const Launch& launch, int i) const {
    return i < launch.front_slots ? front + i * launch.slot_bytes
                                  : back + (i - launch.front_slots) * launch.slot_bytes;
  }
};

// Adds the product of a patch: 4 bits of row, 9 of difference + 256, and the index of the patched
// column's digit among the activations in the order of triples.
__device__ __forceinline__ void add_patch(u32 patch, const u8* triples, int (*out)[kBatch][2]) {
  const int row = patch & 15;
  const int difference = static_cast<int>(patch >> 4 & 511) - 256;
  const u32 index = patch >> 13;
  const u8* digits = triples + (index >> 5) * kStepBytes * kBatch + (index & 31);
#pragma unroll
  for (int vector = 0; vector < kBatch; ++vector) {
#pragma unroll
    for (int digit = 0; digit < 2; ++digit) {
      atomicAdd(&out[row][vector][digit],
                difference * static_cast<signed char>(digits[vector * kStepBytes + digit * 32]));
    }
  }
}

// Decodes and multiplies kTogether segments of a chunk, once it is in its slot.
__device__ __forceinline__ void multiply_segments(const Launch& launch, const Matrix& matrix,
                                                  const Dynamic& dynamic, State& state,
                                                  const Position& at) {
  const int lane = threadIdx.x % kLanes;
  const u8* data = dynamic.slot(launch, at.slot);
  const u16* bounds = state.ring.bounds + at.in_tile * matrix.segments;
  const int spans[kTogether] = {bounds[at.segment + 1] - bounds[at.segment],
                                bounds[at.segment + 2] - bounds[at.segment + 1]};
  const uint4 stored = state.ring.wait(at);
  const u8* tail = data + stored.z;
  const u8* second = data + (stored.w >> 16) * kWordRowBytes;
  Stream streams[kTogether][kStreams] = {{{data, segment_start(tail, at.segment, 0, lane)},
                                          {second, segment_start(tail, at.segment, 1, lane)}},
                                         {{data, segment_start(tail, at.segment + 1, 0, lane)},
                                          {second, segment_start(tail, at.segment + 1, 1, lane)}}};
  u32 activations[kTogether];
#pragma unroll
  for (int k = 0; k < kTogether; ++k) {
    activations[k] =
        shared_address(dynamic.triples) + bounds[at.segment + k] * 3 * kStepBytes * kBatch;
  }
  Accumulator parts[kSums];
#pragma unroll
  for (Accumulator& part : parts) part.clear();
  const int together = min(spans[0], spans[1]);
  multiply_spans<2>(streams, activations, 0, together, parts);
  multiply_spans<1>(streams, activations, 0, spans[0] - together, parts);
  multiply_spans<1>(streams, activations, 1, spans[1] - together, parts);

  const u32* words = chunk_words(tail, matrix.segments, at.in_tile == 0);
  const int bits = matrix.raw_bits;
  if (bits != 0) {
    const int left = first_unit(bounds[0] * kSpanColumns);
    const int units = end_unit(min(bounds[matrix.segments] * kSpanColumns, launch.columns)) - left;
    const int begin = matrix.segments.divide(units * at.segment);
    const int end = matrix.segments.divide(units * (at.segment + kTogether));
    const u32 raws = shared_address(dynamic.raws) + left * 2 * kStepBytes * kBatch;
    if (bits & 4) {
      multiply_raw<4>(words, begin, end, raws, lane, bits & 3, parts);
      words += units * 4 * kLanes;
    }
    if (bits & 2) {
      multiply_raw<2>(words, begin, end, raws, lane, bits & 1, parts);
      words += units * 2 * kLanes;
    }
    if (bits & 1) {
      multiply_raw<1>(words, begin, end, raws, lane, 0, parts);
      words += units * kLanes;
    }
  }
  if (at.in_tile == 0 && at.segment == 0) {
    // Atomic, like everything that warps exchange without a barrier of the block.
    const int* from = reinterpret_cast<const int*>(tile_rows(tail, matrix.segments));
    int* to = reinterpret_cast<int*>(state.rows[at.tile % kOpenTiles]);
    for (int i = lane; i < kTileRows * static_cast<int>(sizeof(Row) / sizeof(int)); i += kLanes) {
      atomicExch(&to[i], from[i]);
    }
  }
  auto* out = state.sums[at.tile % kOpenTiles];
  const int patches = stored.w & 0xffff;
  for (int i = at.segment / kTogether * kLanes + lane; i < patches;
       i += matrix.segments / kTogether * kLanes) {
    add_patch(words[i], dynamic.triples, out);
  }
  add_sums(parts, out);
}

// Where the outputs of a block's vectors are.
struct Outputs {
  int vectors;        // that have an output
  const int* places;  // of each among all; null if they are in order

  __device__ __forceinline__ long long operator[](int vector) const {
    return places == nullptr ? vector : places[vector];
  }
};

// Scales the finished sums of a tile, writes them, and clears them for the tile that uses them
// next.
__device__ __forceinline__ void finish_tile(const Launch& launch, const Matrix& matrix,
                                            const Outputs& outputs, State& state, int open,
                                            int tile) {
  const int lane = threadIdx.x % kLanes;
  for (int i = lane; i < kTileRows * kBatch; i += kLanes) {
    const int vector = i % kBatch;
    int* sums = state.sums[open][i / kBatch][vector];
    const double x_sum = state.rounded.sum[vector];
    const double sum = 256.0 * sums[0] + sums[1] + matrix.base * x_sum;
    sums[0] = sums[1] = 0;
    if (tile * kTileRows + i / kBatch >= matrix.rows || vector >= outputs.vectors) continue;
    const Row row = state.rows[open][i / kBatch];
    const double value = (sum * row.scale + x_sum * row.offset) * state.rounded.scale[vector];
    store_value(launch.y, outputs[vector] * launch.y_stride + matrix.y_begin + row.index,
                static_cast<float>(value), kType);
  }
}

// Multiplies a matrix with vector(0), vector(1), and so on, as number `block` of some blocks.
// ready() is called when the first chunks are requested, before vectors are read.
template <class Vectors, class Ready>
__device__ __forceinline__ void multiply_matrix(const Launch& launch, const Matrix& matrix,
                                                int block, const Divisor& blocks,
                                                const Outputs& outputs, State& state, u8* memory,
                                                Vectors vector, Ready ready) {
  u8* table = table_in(memory);
  u8* behind = table + kTableBytes;
  u8* activations = launch.in_front ? memory : behind;
  const int activation_bytes =
      launch.in_front ? 0 : (launch.triple_bytes + launch.raw_bytes + 127) & ~127;
  const Dynamic dynamic{activations, activations + launch.triple_bytes, memory,
                        behind + activation_bytes};
  const int tiles = block < matrix.tiles ? blocks.divide(matrix.tiles - 1 - block) + 1 : 0;
  const int chunks = tiles * matrix.tile_chunks;
  // The entry in the table of chunks; any entry for a chunk that does not exist.
  const auto stored_chunk = [&](int chunk) {
    const int tile = matrix.tile_chunks.divide(chunk);
    const int stored = (block + tile * blocks - tile) * matrix.tile_chunks + chunk;
    return __ldg(&matrix.chunks[chunk < chunks ? stored : 0]);
  };

  // What does not depend on the previous kernel is requested first, so that weights stream in while
  // that still runs. The last warp requests them; the others need not wait for the table of chunks.
  const int thread = threadIdx.x;
  const int slot = thread - kRounding;
  const int asked = min(launch.slots, chunks);
  uint4 chunk;
  if (slot >= 0) chunk = stored_chunk(slot);
  const TableCopies copies(matrix.table);
  const int bound_count = matrix.tile_chunks * matrix.segments + 1;
  const u16 bound = __ldg(&matrix.bounds[min(thread, bound_count - 1)]);
  const auto fetch = [&](int into, uint4 stored) {
    state.ring.fetch(into, dynamic.slot(launch, into), matrix, stored);
  };
  if (slot >= 0) {
    if (slot < launch.slots) state.ring.open(slot);
    __syncwarp();  // any lane of a warp may issue its copies
    fetch_first(0, min(launch.early, asked), chunk, fetch);
  }
  ready();
  const DigitsOut out{dynamic.triples, matrix.spans * (kSpanColumns / kDozen), dynamic.raws,
                      launch.raw_bytes / (8 * kBatch)};
  round_vector<1, kRounding>(vector(0), 0, 0, out, state.rounded, [&] {
    if (slot >= 0) fetch_first(launch.early, asked, chunk, fetch);
    if (thread < bound_count) state.ring.bounds[thread] = bound;
    copies.store(table, 0);
    for (int i = thread; i < kOpenTiles * kTileRows * kBatch * 2; i += THREADS)
      (&state.sums[0][0][0][0])[i] = 0;
    if (thread < kOpenTiles) state.tile_done[thread] = state.tile_rounds[thread] = 0;
  });
#pragma unroll 1
  for (int i = 1; i < kBatch; ++i)
    round_vector<1, kRounding>(vector(i), i, i, out, state.rounded, [] {});
  __syncthreads();

  const int lane = threadIdx.x % kLanes;
  let_next_begin();
  const int shares = matrix.segments / kTogether;
  for (int share = threadIdx.x / kLanes; share < chunks * shares; share += THREADS / kLanes) {
    const Position at(share * kTogether, matrix, launch.slots);
    const int open = at.tile % kOpenTiles;
    const u32 round = at.tile / kOpenTiles;
    if (round != 0) {
      // Slots hold few chunks, but while one warp is at a chunk, others may pass by many.
      while (*static_cast<volatile u32*>(&state.tile_rounds[open]) != round) __nanosleep(32);
      fence_block();
    }
    // The chunk that takes the slot next.
    const int ahead = at.chunk + launch.slots;
    uint4 next;
    if (ahead < chunks) next = stored_chunk(ahead);
    multiply_segments(launch, matrix, dynamic, state, at);
    __syncwarp();
    u32 last = 0;
    if (lane == 0) {
      fence_block();
      last =
          atomicAdd(&state.tile_done[open], 1) + 1 == static_cast<u32>(matrix.tile_chunks * shares);
      fence_block();
    }
    if (__shfl_sync(~0u, last, 0)) {
      __syncwarp();  // shows the other lanes what lane 0's fence made visible
      finish_tile(launch, matrix, outputs, state, open, block + at.tile * blocks);
      __syncwarp();
      if (lane == 0) {
        state.tile_done[open] = 0;
        fence_block();
        ++*static_cast<volatile u32*>(&state.tile_rounds[open]);
      }
      __syncwarp();
    }
    // The tile is finished before its last slot is filled again.
    const bool wanted = lane == 0 && state.ring.release(at, shares) && ahead < chunks;
    fetch_next(wanted, [&] { fetch(at.slot, next); });
  }
}

}  // namespace
