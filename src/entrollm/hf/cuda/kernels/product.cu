// y = W x for a few vectors: each chunk is copied to shared memory, decoded to registers, and
// multiplied by the matrix unit; no decoded weight is written anywhere. BATCH, THREADS, and BLOCKS
// of a multiprocessor are defined when this is compiled.
#include "ring.cuh"

namespace {

constexpr int kBatch = BATCH;
// Columns of the matrix unit's result: two digits of a vector each, eight per instruction.
constexpr int kPanels = (2 * kBatch + 7) / 8;
// Segments that a warp decodes side by side, to have enough loads in flight.
constexpr int kTogether = 2;
// Tiles that can be in work at once; slots never hold chunks of more.
constexpr int kOpenTiles = kBatch > 4 ? 8 : 16;
constexpr int kMaxSlots = kBatch > 4 ? 6 : 12;
// The largest magnitude whose two balanced digits both fit int8.
constexpr float kLargest = 32639.0f;
// As bits, the largest magnitude that is finite.
constexpr u32 kFinite = 0x7f7fffffu;
// Added to a number of less than 22 bits, this leaves the number plus 2^15 in the low 16 bits.
constexpr float kToBits = 12582912.0f + 32768.0f;
constexpr u32 kBias = 32768;
// Columns that a thread rounds at a time.
constexpr int kDozen = 12;

struct Launch {
  Matrix matrices[kMaxMatrices];
  const void* x;
  void* y;
  int count;
  int columns;  // a multiple of 4; x has zeros where the matrix has no column
  int type;     // of x and y: 0 float32, 1 bfloat16, 2 float16
  int y_stride;
  int slots;
  int slot_bytes;
  int triple_bytes;  // activations in the order of triples
  int raw_bytes;     // activations in the order of raw units, or 0
  int in_front;      // 1: activations lie in front of the table and slots behind it
  int front_slots;   // slots in front of the table, if activations are not
  int early;         // chunks to ask for before x is read, which would else wait for their transfer
};

// Static shared memory.
struct State {
  Row rows[kOpenTiles][kTileRows];
  int sums[kOpenTiles][kTileRows][kBatch][2];
  u32 tile_done[kOpenTiles];
  Ring<kMaxSlots> ring;
  float x_scale[kBatch];
  int x_sum[kBatch];  // of the rounded vectors
  u32 largest[THREADS / kLanes];
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

// Four activations as they are stored.
template <int kType>
struct Stored {
  using Bits = uint2;

  __device__ static __forceinline__ float4 values(uint2 bits) {
    return make_float4(value(bits.x), value(bits.x >> 16), value(bits.y), value(bits.y >> 16));
  }

  __device__ static __forceinline__ float value(u32 bits) {
    if constexpr (kType == 1) return __uint_as_float(bits << 16);
    float value;
    asm("{\n .reg .b16 h;\n mov.b16 h, %1;\n cvt.f32.f16 %0, h;\n}"
        : "=f"(value)
        : "h"(static_cast<u16>(bits)));
    return value;
  }
};

template <>
struct Stored<0> {
  using Bits = float4;
  __device__ static __forceinline__ float4 values(float4 bits) { return bits; }
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

  // Adds 16 rows x 32 bytes of weights times every vector's digits at `activations`, shared memory.
  __device__ __forceinline__ void multiply(u32 a0, u32 a1, u32 a2, u32 a3, u32 activations) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      u32 b0, b1;
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(b0), "=r"(b1)
                   : "r"(activations + panel * 4 * kStepBytes));
      asm volatile(
          "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+r"(sums[panel][0]), "+r"(sums[panel][1]), "+r"(sums[panel][2]), "+r"(sums[panel][3])
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
  }

  __device__ __forceinline__ void add(const Accumulator& other, int shift) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[panel][i] += other.sums[panel][i] >> shift;
    }
  }
};

// Where a lane reads the digits of its column of the matrix unit's right side; lanes beyond the
// batch read vector 0, whose result nobody uses.
__device__ __forceinline__ u32 activation_offset(int lane) {
  const int vector = (lane >> 3) < kBatch ? lane >> 3 : 0;
  return vector * kStepBytes + ((lane >> 2) & 1) * 32 + (lane & 3) * 8;
}

// Decodes and multiplies groups of kCount segments side by side, each into sums of its own: the
// matrix unit need not wait for itself.
template <int kCount>
__device__ __forceinline__ void multiply_groups(Stream (&streams)[kTogether][kStreams],
                                                u32 (&activations)[kTogether], int first,
                                                int groups, Accumulator (&sums)[kTogether]) {
  constexpr int kStep = kStepBytes * kBatch;
#pragma unroll 1
  for (int i = 0; i < groups; ++i) {
    u32 entries[kCount][kStreams][kGroupTriples];
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
          sums[first + k].multiply(e[0][2 * step], e[1][2 * step], e[0][2 * step + 1],
                                   e[1][2 * step + 1], activations[first + k] + step * kStep);
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
                                             int lane, int scale_bits, Accumulator& total) {
  constexpr u32 kMask = ((0xff00u >> kBits) & 0xffu) * 0x01010101u;
  constexpr int kPerWord = 8 / kBits;
  Accumulator sums[2];
  sums[0].clear();
  sums[1].clear();
  words += begin * kBits * kLanes + lane;
  activations += begin * 2 * kStepBytes * kBatch;
#pragma unroll 2
  for (int unit = begin; unit < end; ++unit) {
    u32 a[8];
#pragma unroll
    for (int i = 0; i < kBits; ++i) {
      const u32 word = words[i * kLanes];
#pragma unroll
      for (int m = 0; m < kPerWord; ++m) a[i * kPerWord + m] = (word << (kBits * m)) & kMask;
    }
    sums[0].multiply(a[0], a[1], a[2], a[3], activations);
    sums[1].multiply(a[4], a[5], a[6], a[7], activations + kStepBytes * kBatch);
    words += kBits * kLanes;
    activations += 2 * kStepBytes * kBatch;
  }
  sums[0].add(sums[1], 0);
  total.add(sums[0], 8 - kBits - scale_bits);
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

// Decodes and multiplies kTogether segments of a chunk that lies in its slot.
__device__ __forceinline__ void multiply_segments(const Launch& launch, const Matrix& matrix,
                                                  const Dynamic& dynamic, State& state,
                                                  const Divisors& by, const Place& at) {
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
  const u32 offset = activation_offset(lane);
  u32 activations[kTogether];
#pragma unroll
  for (int k = 0; k < kTogether; ++k) {
    activations[k] =
        shared_address(dynamic.triples) + bounds[at.segment + k] * 3 * kStepBytes * kBatch + offset;
  }
  Accumulator parts[kTogether];
  parts[0].clear();
  parts[1].clear();
  const int together = min(groups[0], groups[1]);
  multiply_groups<2>(streams, activations, 0, together, parts);
  multiply_groups<1>(streams, activations, 0, groups[0] - together, parts);
  multiply_groups<1>(streams, activations, 1, groups[1] - together, parts);
  Accumulator& sums = parts[0];
  sums.add(parts[1], 0);

  const u32* words = chunk_words(tail, matrix.segments, at.in_tile == 0);
  const int bits = matrix.raw_bits;
  if (bits != 0) {
    const int left = first_unit(bounds[0] * kGroupColumns);
    const int units = end_unit(min(bounds[matrix.segments] * kGroupColumns, launch.columns)) - left;
    const int begin = by.shares.divide(units * (at.segment / kTogether));
    const int end = by.shares.divide(units * (at.segment / kTogether + 1));
    const u32 raws = shared_address(dynamic.raws) + left * 2 * kStepBytes * kBatch + offset;
    if (bits & 4) {
      multiply_raw<4>(words, begin, end, raws, lane, bits & 3, sums);
      words += units * 4 * kLanes;
    }
    if (bits & 2) {
      multiply_raw<2>(words, begin, end, raws, lane, bits & 1, sums);
      words += units * 2 * kLanes;
    }
    if (bits & 1) {
      multiply_raw<1>(words, begin, end, raws, lane, 0, sums);
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
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    const int vector = panel * 4 + (lane & 3);
    if (vector < kBatch) {
      const int row = lane >> 2;
      atomicAdd(&out[row][vector][0], sums.sums[panel][0]);
      atomicAdd(&out[row][vector][1], sums.sums[panel][1]);
      atomicAdd(&out[row + 8][vector][0], sums.sums[panel][2]);
      atomicAdd(&out[row + 8][vector][1], sums.sums[panel][3]);
    }
  }
}

// Scales the finished sums of a tile, writes them, and clears them for the tile that takes their
// place.
__device__ __forceinline__ void finish_tile(const Launch& launch, const Matrix& matrix,
                                            State& state, int open, int tile) {
  const int lane = threadIdx.x % kLanes;
  for (int i = lane; i < kTileRows * kBatch; i += kLanes) {
    const int vector = i % kBatch;
    int* sums = state.sums[open][i / kBatch][vector];
    const double x_sum = state.x_sum[vector];
    const double sum = 256.0 * sums[0] + sums[1] + matrix.base * x_sum;
    sums[0] = sums[1] = 0;
    if (tile * kTileRows + i / kBatch >= matrix.rows) continue;
    const Row row = state.rows[open][i / kBatch];
    const double value = (sum * row.scale + x_sum * row.offset) * state.x_scale[vector];
    store_value(launch.y,
                static_cast<long long>(vector) * launch.y_stride + matrix.y_begin + row.index,
                static_cast<float>(value), launch.type);
  }
}

__device__ __forceinline__ u32 block_max(u32 value, u32* scratch) {
  value = __reduce_max_sync(~0u, value);
  if (threadIdx.x % kLanes == 0) scratch[threadIdx.x / kLanes] = value;
  __syncthreads();
  return __reduce_max_sync(~0u, scratch[threadIdx.x % (THREADS / kLanes)]);
}

// Two numbers of 16 bits, 2^15 added to each, and the same for their high digits: 256 high + low is
// the number, with low in [-128, 128).
struct Pair {
  u32 low;
  u32 high;

  __device__ __forceinline__ Pair(u32 first, u32 second)
      : low(__byte_perm(first, second, 0x5410)), high(low + 0x00800080u) {}

  // Adds up both, with what was added to them.
  __device__ __forceinline__ u32 sum(u32 total) const {
    asm("dp2a.lo.u32.u32 %0, %1, %2, %0;" : "+r"(total) : "r"(low), "r"(0x0101u));
    return total;
  }
};

// The digits of three numbers: a word's first byte stays 0, since entries have the length of their
// code there. `order` says where the third lies.
__device__ __forceinline__ void triple_digits(const Pair& two, const Pair& third, u32 order,
                                              u32& high, u32& low) {
  high = (__byte_perm(two.high, third.high, 0x5310u + order) ^ 0x80808000u) & 0xffffff00u;
  low = __byte_perm(two.low, third.low, 0x4200u + order) & 0xffffff00u;
}

// Stores word `i` of a vector in the order of raw units: by quarter, half, and step.
__device__ __forceinline__ void store_digits(u8* to, int i, int vector, u32 high, u32 low) {
  u32* at = reinterpret_cast<u32*>(to + (i / 8 * kBatch + vector) * kStepBytes + i % 4 * 8 +
                                   i / 4 % 2 * 4);
  at[0] = high;
  at[8] = low;
}

// The activations of one thread, twelve neighbours at a time: four triples, and three words of raw
// units. Those of the first turns stay in registers.
template <int kType>
class Activations {
 public:
  __device__ __forceinline__ Activations(const Launch& launch, const float* column_scale,
                                         int vector, int dozens)
      : x_(static_cast<const Bits*>(launch.x) + vector * (launch.columns / 4)),
        column_scale_(reinterpret_cast<const float4*>(column_scale)),
        count_(launch.columns / 4),
        dozens_(dozens) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) read(threadIdx.x + turn * THREADS, kept_[turn]);
  }

  // Calls use(dozen, its scaled values), in all lanes of a warp or in none.
  template <class Use>
  __device__ __forceinline__ void for_each(Use use) const {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = threadIdx.x + turn * THREADS;
      if (i - lane < dozens_) give(i, kept_[turn], use);
    }
    for (int i = threadIdx.x + kTurns * THREADS; i - lane < dozens_; i += THREADS) {
      Bits bits[3];
      read(i, bits);
      give(i, bits, use);
    }
  }

 private:
  using Bits = typename Stored<kType>::Bits;
  static constexpr int kTurns = 2;

  __device__ __forceinline__ void read(int dozen, Bits (&bits)[3]) const {
#pragma unroll
    for (int k = 0; k < 3; ++k) bits[k] = x_[min(dozen * 3 + k, count_ - 1)];
  }

  template <class Use>
  __device__ __forceinline__ void give(int dozen, const Bits (&bits)[3], Use use) const {
    float values[kDozen];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const int at = dozen * 3 + k;
      float4 four = Stored<kType>::values(bits[k]);
      if (column_scale_ != nullptr) {
        const float4 scale = __ldg(&column_scale_[min(at, count_ - 1)]);
        four = make_float4(four.x * scale.x, four.y * scale.y, four.z * scale.z, four.w * scale.w);
      }
      if (at >= count_) four = make_float4(0, 0, 0, 0);
      values[4 * k] = four.x;
      values[4 * k + 1] = four.y;
      values[4 * k + 2] = four.z;
      values[4 * k + 3] = four.w;
    }
    use(dozen, values);
  }

  const Bits* x_;
  const float4* column_scale_;
  int count_;
  int dozens_;
  Bits kept_[kTurns][3];
};

// Stores the digits of a dozen in the order of triples; returns their sum, with what was added to
// them. Two lanes have one step together: one stores its high digits, the other its low ones.
__device__ __forceinline__ u32 store_triples(u8* triples, int dozen, int vector,
                                             const u32 (&rounded)[kDozen], bool inside) {
  const bool odd = dozen % 2 != 0;
  const Pair thirds[2] = {{rounded[2], rounded[5]}, {rounded[8], rounded[11]}};
  u32 sum = thirds[0].sum(thirds[1].sum(0));
  u32 digits[2][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Pair two(rounded[3 * j], rounded[3 * j + 1]);
    triple_digits(two, thirds[j / 2], j % 2 * 0x2000u, digits[0][j], digits[1][j]);
    sum = two.sum(sum);
  }
  u32 other[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    other[j] = __shfl_xor_sync(~0u, odd ? digits[0][j] : digits[1][j], 1);
  }
  if (!inside) return sum;
  uint4* to = reinterpret_cast<uint4*>(triples + (dozen / 2 * kBatch + vector) * kStepBytes +
                                       (odd ? kStepBytes / 2 : 0));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    to[i] =
        odd ? make_uint4(other[2 * i], digits[1][2 * i], other[2 * i + 1], digits[1][2 * i + 1])
            : make_uint4(digits[0][2 * i], other[2 * i], digits[0][2 * i + 1], other[2 * i + 1]);
  }
  return sum;
}

// Rounds a vector to 16 bits of its largest magnitude and stores its digits, in the orders of
// triples and of raw units. NaN and infinity make its scale NaN. Calls between() once all of the
// vector's first turns are read.
template <int kType, class Between>
__device__ __forceinline__ void round_activations(const Launch& launch, const Matrix& matrix,
                                                  const Dynamic& dynamic, State& state, int vector,
                                                  Between between) {
  const int triple_dozens = matrix.groups * (kGroupColumns / kDozen);
  const int raw_words = launch.raw_bytes / (8 * kBatch);
  const int dozens = max(triple_dozens, (raw_words + 2) / 3);
  const Activations<kType> x(launch, matrix.column_scale, vector, dozens);
  u32 largest_bits = 0;
  x.for_each([&](int, const float (&values)[kDozen]) {
#pragma unroll
    for (int i = 0; i < kDozen; ++i) {
      largest_bits = max(largest_bits, __float_as_uint(values[i]) & 0x7fffffffu);
    }
  });
  largest_bits = block_max(largest_bits, state.largest);
  between();
  const bool finite = largest_bits <= kFinite;
  const float largest = __uint_as_float(largest_bits);
  // An exact power of two keeps the inverse of a tiny magnitude finite.
  const bool tiny = largest < 0x1p-60f;
  const float inverse =
      finite && largest_bits != 0 ? kLargest / (tiny ? largest * 0x1p100f : largest) : 0.0f;
  u32 sum = 0;
  x.for_each([&](int dozen, const float (&values)[kDozen]) {
    u32 rounded[kDozen];
#pragma unroll
    for (int i = 0; i < kDozen; ++i) {
      const float value = tiny ? values[i] * 0x1p100f : values[i];
      rounded[i] = __float_as_uint(__fadd_rn(__fmul_rn(value, inverse), kToBits));
    }
    sum += store_triples(dynamic.triples, dozen, vector, rounded, dozen < triple_dozens) -
           kDozen * kBias;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (dozen * 3 + k >= raw_words) continue;
      const Pair first(rounded[4 * k], rounded[4 * k + 1]);
      const Pair second(rounded[4 * k + 2], rounded[4 * k + 3]);
      store_digits(dynamic.raws, dozen * 3 + k, vector,
                   __byte_perm(first.high, second.high, 0x7531u) ^ 0x80808080u,
                   __byte_perm(first.low, second.low, 0x6420u));
    }
  });
  const int total = __reduce_add_sync(~0u, static_cast<int>(sum));
  if (threadIdx.x % kLanes == 0) atomicAdd(&state.x_sum[vector], total);
  if (threadIdx.x == 0) {
    state.x_scale[vector] = finite ? largest / kLargest : __int_as_float(0x7fc00000);
  }
  __syncthreads();
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
  const int tiles = block < matrix.tiles ? (matrix.tiles - 1 - block) / matrix.cta_count + 1 : 0;
  const int chunks = tiles * matrix.tile_chunks;
  // The entry in the table of chunks, or anything for a chunk that is not there.
  const Divisors by{Divisor(matrix.segments / kTogether), Divisor(launch.slots),
                    Divisor(matrix.tile_chunks)};
  const auto stored_chunk = [&](int chunk) {
    const int tile = by.chunks.divide(chunk);
    const int stored = (block + tile * matrix.cta_count - tile) * matrix.tile_chunks + chunk;
    return __ldg(&matrix.chunks[chunk < chunks ? stored : 0]);
  };

  // Nothing here depends on the kernel before: weights stream in while it still runs. All is asked
  // for before anything is waited for.
  const int asked = min(launch.slots, chunks);
  const int thread = threadIdx.x;
  const uint4 chunk = stored_chunk(thread < asked ? thread : 0);
  const TableCopies copies(matrix.table);
  const int bound_count = matrix.tile_chunks * matrix.segments + 1;
  const u16 bound = __ldg(&matrix.bounds[min(thread, bound_count - 1)]);
  const auto fetch = [&](int begin, int end) {
    if (thread >= begin && thread < end) {
      state.ring.fetch(thread, dynamic.slot(launch, thread), matrix, chunk);
    }
  };
  if (thread < launch.slots) state.ring.open(thread);
  __syncthreads();
  fetch(0, min(launch.early, asked));
  if (thread < bound_count) state.ring.bounds[thread] = bound;
  copies.store(table, 0);
  for (int i = thread; i < kOpenTiles * kTileRows * kBatch * 2; i += THREADS)
    (&state.sums[0][0][0][0])[i] = 0;
  if (thread < kOpenTiles) state.tile_done[thread] = 0;
  if (thread < kBatch) state.x_sum[thread] = 0;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  __syncthreads();
  for (int vector = 0; vector < kBatch; ++vector) {
    const auto between = [&] {
      if (vector == 0) fetch(launch.early, asked);
    };
    if (launch.type == 0) {
      round_activations<0>(launch, matrix, dynamic, state, vector, between);
    } else if (launch.type == 1) {
      round_activations<1>(launch, matrix, dynamic, state, vector, between);
    } else {
      round_activations<2>(launch, matrix, dynamic, state, vector, between);
    }
  }

  const int lane = threadIdx.x % kLanes;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int shares = by.shares.value;
  for (int share = threadIdx.x / kLanes; share < chunks * shares; share += THREADS / kLanes) {
    const Place at(share, kTogether, by);
    // The chunk that takes the slot next.
    const int ahead = at.chunk + launch.slots;
    const uint4 next = stored_chunk(ahead);
    multiply_segments(launch, matrix, dynamic, state, by, at);
    __syncwarp();
    const int open = at.tile % kOpenTiles;
    u32 last = 0;
    if (lane == 0) {
      __threadfence_block();
      last =
          atomicAdd(&state.tile_done[open], 1) + 1 == static_cast<u32>(matrix.tile_chunks * shares);
      __threadfence_block();
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
