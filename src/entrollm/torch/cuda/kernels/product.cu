// y = W x for a few vectors: each chunk is copied to shared memory, decoded to registers, and
// multiplied by the matrix unit; no decoded weight is written anywhere. BATCH, TYPE of x and y (0
// float32, 1 bfloat16, 2 float16), THREADS, and BLOCKS of a multiprocessor are defined when this is
// compiled.
#include "ring.cuh"
#include "vector.cuh"

namespace {

// Columns of the matrix unit's result: two digits of a vector each, eight per instruction.
constexpr int kPanels = (2 * kBatch + 7) / 8;
// Steps whose digits lanes read at a time: one or two vectors leave columns of the matrix unit's
// right side free, which hold those of the next steps. Each has sums of its own then, since only
// the columns of a step's own digits mean anything.
constexpr int kPhases = kBatch == 1 ? 4 : kBatch == 2 ? 2 : 1;
// Segments that a warp decodes side by side, to have enough loads in flight.
constexpr int kTogether = 2;
// Sums that a warp has at a time: the matrix unit need not wait for itself.
constexpr int kSums = kPhases > kTogether ? kPhases : kTogether;
// Tiles that can be in work at once; slots never hold chunks of more.
constexpr int kOpenTiles = kBatch > 4 ? 8 : 16;
constexpr int kMaxSlots = kBatch > 4 ? 6 : 12;

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
  int in_front;      // 1: activations lie in front of the table and slots behind it
  int front_slots;   // slots in front of the table, if activations are not
  int early;  // chunks to ask for before the kernel before has ended; with more, x comes late
};

// Static shared memory.
struct State {
  Row rows[kOpenTiles][kTileRows];
  int sums[kOpenTiles][kTileRows][kBatch][2];
  u32 tile_done[kOpenTiles];
  Ring<kMaxSlots> ring;
  Rounded rounded;
};

struct Dynamic {
  u8* table;
  u8* triples;
  u8* raws;
  u8* front;  // slots in front of the table, and behind it
  u8* back;

  __device__ __forceinline__ u8* slot(const Launch& launch, int i) const {
    return i < launch.front_slots ? front + i * launch.slot_bytes
                                  : back + (i - launch.front_slots) * launch.slot_bytes;
  }
};

// What lanes hold of the matrix unit's right side: digits of up to kPhases steps.
struct Digits {
  u32 words[kPanels][2];

  // From a lane's place in shared memory.
  __device__ __forceinline__ void load(u32 address) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(words[panel][0]), "=r"(words[panel][1])
                   : "r"(address + panel * 4 * kStepBytes));
    }
  }

  // A lane's place in digits of kSteps steps; lanes that hold none of them read a step twice, or a
  // vector, whose results nobody uses.
  template <int kSteps>
  __device__ static __forceinline__ u32 place(int lane) {
    constexpr int kStepLanes = kLanes / kPhases;
    const int step = lane / kStepLanes < kSteps ? lane / kStepLanes : 0;
    const int inside = lane % kStepLanes;
    const int vector = inside / 8 < kBatch ? inside / 8 : 0;
    return (step * kBatch + vector) * kStepBytes + inside % 8 * 8;
  }
};

struct Accumulator {
  int sums[kPanels][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[panel][i] = 0;
    }
  }

  // Adds 16 rows x 32 bytes of weights times every vector's digits.
  __device__ __forceinline__ void multiply(u32 a0, u32 a1, u32 a2, u32 a3, const Digits& digits) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      asm volatile(
          "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+r"(sums[panel][0]), "+r"(sums[panel][1]), "+r"(sums[panel][2]), "+r"(sums[panel][3])
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(digits.words[panel][0]),
            "r"(digits.words[panel][1]));
    }
  }

  __device__ __forceinline__ void add(const Accumulator& other, int shift) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[panel][i] += other.sums[panel][i] >> shift;
    }
  }

  // Takes another's sums instead.
  __device__ __forceinline__ void take_if(bool chosen, const Accumulator& other) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[panel][i] = chosen ? other.sums[panel][i] : sums[panel][i];
    }
  }
};

// Decodes and multiplies groups of kCount segments side by side.
template <int kCount>
__device__ __forceinline__ void multiply_groups(Stream (&streams)[kTogether][kStreams],
                                                u32 (&activations)[kTogether], int first,
                                                int groups, Accumulator (&sums)[kSums]) {
  constexpr int kStep = kStepBytes * kBatch;
  constexpr int kSteps = kGroupColumns / kStepColumns;
  constexpr int kFirst = kPhases < kSteps ? kPhases : kSteps;
  const int lane = threadIdx.x % kLanes;
  // Of the first loads of a group, and of the last, which may be of fewer steps.
  const u32 place = Digits::place<kFirst>(lane);
  const u32 last_place = Digits::place<(kSteps - 1) % kPhases + 1>(lane);
#pragma unroll 1
  for (int i = 0; i < groups; ++i) {
    u32 entries[kCount][kStreams][kGroupTriples];
    Digits digits[kCount];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int s = 0; s < kStreams; ++s) streams[first + k][s].entries(entries[k][s] + half * 3);
      }
      // The first half holds one step and a part of the second.
#pragma unroll
      for (int step = half; step <= 2 * half; ++step) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const u32(&e)[kStreams][kGroupTriples] = entries[k];
          if (step % kPhases == 0) {
            digits[k].load(activations[first + k] + step * kStep +
                           (step + kPhases < kSteps ? place : last_place));
          }
          sums[kPhases > 1 ? step % kPhases : first + k].multiply(
              e[0][2 * step], e[1][2 * step], e[0][2 * step + 1], e[1][2 * step + 1], digits[k]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) activations[first + k] += 3 * kStep;
  }
}

// Bits [0, kBits) of every symbol's raw part lie at the top of a byte after a shift: value * 2^(8 -
// kBits).
template <int kBits>
__device__ __forceinline__ void multiply_raw(const u32* words, int begin, int end, u32 activations,
                                             int lane, int scale_bits,
                                             Accumulator (&total)[kSums]) {
  constexpr u32 kMask = ((0xff00u >> kBits) & 0xffu) * 0x01010101u;
  constexpr int kPerWord = 8 / kBits;
  constexpr int kUnitBytes = 2 * kStepBytes * kBatch;
  Accumulator sums[2];
  sums[0].clear();
  sums[1].clear();
  words += begin * kBits * kLanes + lane;
  activations += begin * kUnitBytes;
  const u32 place = Digits::place<kPhases == 1 ? 1 : 2>(lane);
#pragma unroll 2
  for (int unit = begin; unit < end; ++unit) {
    u32 a[8];
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const u32 word = words[i * kLanes];
#pragma unroll
      for (int m = 0; m < kPerWord; ++m) a[i * kPerWord + m] = (word << (kBits * m)) & kMask;
    }
    Digits digits;
    digits.load(activations + place);
    sums[0].multiply(a[0], a[1], a[2], a[3], digits);
    if (kPhases == 1) digits.load(activations + place + kStepBytes * kBatch);
    sums[1].multiply(a[4], a[5], a[6], a[7], digits);
    words += kBits * kLanes;
    activations += kUnitBytes;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) total[i].add(sums[i], 8 - kBits - scale_bits);
}

// A patch: row, difference + 256, place among the triples' activations.
__device__ __forceinline__ void add_patch(u32 patch, const u8* triples, int (*out)[kBatch][2]) {
  const int row = patch & 15;
  const int difference = static_cast<int>(patch >> 4 & 511) - 256;
  const u32 place = patch >> 13;
  const u8* digits = triples + (place >> 5) * kStepBytes * kBatch + (place & 31);
#pragma unroll
  for (int vector = 0; vector < kBatch; ++vector) {
#pragma unroll
    for (int digit = 0; digit < 2; ++digit) {
      atomicAdd(&out[row][vector][digit],
                difference * static_cast<signed char>(digits[vector * kStepBytes + digit * 32]));
    }
  }
}

// Adds a warp's sums to those of a tile.
__device__ __forceinline__ void add_sums(Accumulator (&parts)[kSums], int (*out)[kBatch][2]) {
  // A lane has both digits' sums of one vector, in the phase that its columns belong to.
  constexpr int kVectors = 4 / kPhases;
  const int lane = threadIdx.x % kLanes;
  const int row = lane >> 2;
  Accumulator& sums = parts[0];
#pragma unroll
  for (int i = 1; i < kSums; ++i) {
    if (kPhases > 1) {
      sums.take_if((lane & 3) / kVectors == i, parts[i]);
    } else {
      sums.add(parts[i], 0);
    }
  }
  if constexpr (kBatch == 1) {
    // Four lanes have sums of the same rows and digits; each takes one of them over, so that no two
    // lanes meet at an address.
    int (&mine)[4] = sums.sums[0];
    const bool low = lane & 1;
    const bool below = lane & 2;
    const int upper = (low ? mine[1] : mine[0]) + __shfl_xor_sync(~0u, low ? mine[0] : mine[1], 1);
    const int lower = (low ? mine[3] : mine[2]) + __shfl_xor_sync(~0u, low ? mine[2] : mine[3], 1);
    const int sum = (below ? lower : upper) + __shfl_xor_sync(~0u, below ? upper : lower, 2);
    atomicAdd(&out[row + (below ? 8 : 0)][0][low], sum);
  } else {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int vector = panel * 4 + (lane & 3) % kVectors;
      if (vector >= kBatch) continue;
      atomicAdd(&out[row][vector][0], sums.sums[panel][0]);
      atomicAdd(&out[row][vector][1], sums.sums[panel][1]);
      atomicAdd(&out[row + 8][vector][0], sums.sums[panel][2]);
      atomicAdd(&out[row + 8][vector][1], sums.sums[panel][3]);
    }
  }
}

// Decodes and multiplies kTogether segments of a chunk that lies in its slot.
__device__ __forceinline__ void multiply_segments(const Launch& launch, const Matrix& matrix,
                                                  const Dynamic& dynamic, State& state,
                                                  const Place& at) {
  const int lane = threadIdx.x % kLanes;
  const u8* data = dynamic.slot(launch, at.slot);
  const u16* bounds = state.ring.bounds + at.in_tile * matrix.segments;
  const int groups[kTogether] = {bounds[at.segment + 1] - bounds[at.segment],
                                 bounds[at.segment + 2] - bounds[at.segment + 1]};
  const uint4 stored = state.ring.wait(at);
  const u8* tail = data + stored.z;
  const u8* second = data + (stored.w >> 16) * kWordRowBytes;
  Stream streams[kTogether][kStreams] = {
      {{dynamic.table, data, segment_start(tail, at.segment, 0, lane)},
       {dynamic.table, second, segment_start(tail, at.segment, 1, lane)}},
      {{dynamic.table, data, segment_start(tail, at.segment + 1, 0, lane)},
       {dynamic.table, second, segment_start(tail, at.segment + 1, 1, lane)}}};
  u32 activations[kTogether];
#pragma unroll
  for (int k = 0; k < kTogether; ++k) {
    activations[k] =
        shared_address(dynamic.triples) + bounds[at.segment + k] * 3 * kStepBytes * kBatch;
  }
  Accumulator parts[kSums];
#pragma unroll
  for (Accumulator& part : parts) part.clear();
  const int together = min(groups[0], groups[1]);
  multiply_groups<2>(streams, activations, 0, together, parts);
  multiply_groups<1>(streams, activations, 0, groups[0] - together, parts);
  multiply_groups<1>(streams, activations, 1, groups[1] - together, parts);

  const u32* words = chunk_words(tail, matrix.segments, at.in_tile == 0);
  const int bits = matrix.raw_bits;
  if (bits != 0) {
    const int left = first_unit(bounds[0] * kGroupColumns);
    const int units = end_unit(min(bounds[matrix.segments] * kGroupColumns, launch.columns)) - left;
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
    // Atomic, as is all that passes from warp to warp without a barrier of the block.
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

// Scales the finished sums of a tile, writes them, and clears them for the tile that takes their
// place.
__device__ __forceinline__ void finish_tile(const Launch& launch, const Matrix& matrix,
                                            State& state, int open, int tile) {
  const int lane = threadIdx.x % kLanes;
  for (int i = lane; i < kTileRows * kBatch; i += kLanes) {
    const int vector = i % kBatch;
    int* sums = state.sums[open][i / kBatch][vector];
    const double x_sum = state.rounded.sum[vector];
    const double sum = 256.0 * sums[0] + sums[1] + matrix.base * x_sum;
    sums[0] = sums[1] = 0;
    if (tile * kTileRows + i / kBatch >= matrix.rows) continue;
    const Row row = state.rows[open][i / kBatch];
    const double value = (sum * row.scale + x_sum * row.offset) * state.rounded.scale[vector];
    store_value(launch.y,
                static_cast<long long>(vector) * launch.y_stride + matrix.y_begin + row.index,
                static_cast<float>(value), kType);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    multiply(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ State state;
  u8* table = table_place(memory);
  u8* behind = table + kTableBytes;
  u8* activations = launch.in_front ? memory : behind;
  const int activation_bytes =
      launch.in_front ? 0 : (launch.triple_bytes + launch.raw_bytes + 127) & ~127;
  const Dynamic dynamic{table, activations, activations + launch.triple_bytes, memory,
                        behind + activation_bytes};
  int index = 0;
  while (index + 1 < launch.count &&
         static_cast<int>(blockIdx.x) >= launch.matrices[index + 1].cta_begin)
    ++index;
  const Matrix& matrix = launch.matrices[index];
  const int block = blockIdx.x - matrix.cta_begin;
  const int tiles =
      block < matrix.tiles ? matrix.cta_count.divide(matrix.tiles - 1 - block) + 1 : 0;
  const int chunks = tiles * matrix.tile_chunks;
  // The entry in the table of chunks, or anything for a chunk that is not there.
  const auto stored_chunk = [&](int chunk) {
    const int tile = matrix.tile_chunks.divide(chunk);
    const int stored = (block + tile * matrix.cta_count - tile) * matrix.tile_chunks + chunk;
    return __ldg(&matrix.chunks[chunk < chunks ? stored : 0]);
  };

  // What does not depend on the kernel before is asked for first: weights stream in while it still
  // runs. The last warp asks for them, so that the others need not wait for the table of chunks.
  const int thread = threadIdx.x;
  const int slot = thread - kRounding;
  const int asked = min(launch.slots, chunks);
  uint4 chunk;
  if (slot >= 0) chunk = stored_chunk(slot);
  const TableCopies copies(matrix.table);
  const int bound_count = matrix.tile_chunks * matrix.segments + 1;
  const u16 bound = __ldg(&matrix.bounds[min(thread, bound_count - 1)]);
  const auto fetch = [&](int begin, int end) {
    if (slot >= begin && slot < end) {
      state.ring.fetch(slot, dynamic.slot(launch, slot), matrix, chunk);
    }
  };
  if (slot >= 0) {
    if (slot < launch.slots) state.ring.open(slot);
    __syncwarp();  // a warp's bulk copies are made by whichever of its lanes
  }
  fetch(0, min(launch.early, asked));
  if (thread < kBatch) state.rounded.sum[thread] = 0;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const DigitsOut out{dynamic.triples, matrix.groups * (kGroupColumns / kDozen), dynamic.raws,
                      launch.raw_bytes / (8 * kBatch)};
  const auto vector = [&](int i) {
    return Vector(launch.x, i, launch.columns, matrix.column_scale);
  };
  round_vector(vector(0), 0, out, state.rounded, [&] {
    fetch(launch.early, asked);
    if (thread < bound_count) state.ring.bounds[thread] = bound;
    copies.store(table, 0);
    for (int i = thread; i < kOpenTiles * kTileRows * kBatch * 2; i += THREADS)
      (&state.sums[0][0][0][0])[i] = 0;
    if (thread < kOpenTiles) state.tile_done[thread] = 0;
  });
#pragma unroll 1
  for (int i = 1; i < kBatch; ++i) round_vector(vector(i), i, out, state.rounded, [] {});
  __syncthreads();

  const int lane = threadIdx.x % kLanes;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int shares = matrix.segments / kTogether;
  for (int share = threadIdx.x / kLanes; share < chunks * shares; share += THREADS / kLanes) {
    const Place at(share * kTogether, matrix, launch.slots);
    // The chunk that takes the slot next.
    const int ahead = at.chunk + launch.slots;
    uint4 next;
    if (ahead < chunks) next = stored_chunk(ahead);
    multiply_segments(launch, matrix, dynamic, state, at);
    __syncwarp();
    const int open = at.tile % kOpenTiles;
    u32 last = 0;
    if (lane == 0) {
      fence_block();
      last =
          atomicAdd(&state.tile_done[open], 1) + 1 == static_cast<u32>(matrix.tile_chunks * shares);
      fence_block();
    }
    if (__shfl_sync(~0u, last, 0)) {
      __syncwarp();  // the other lanes see what lane 0's fence made visible
      finish_tile(launch, matrix, state, open, block + at.tile * matrix.cta_count);
      if (lane == 0) state.tile_done[open] = 0;
      __syncwarp();
    }
    // The tile is out of the way before its last slot is filled again.
    if (lane == 0 && state.ring.release(at, shares) && ahead < chunks) {
      state.ring.fetch(at.slot, dynamic.slot(launch, at.slot), matrix, next);
    }
    __syncwarp();
  }
}
