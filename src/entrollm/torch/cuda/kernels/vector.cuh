// Prepares x for the matrix unit: rounds it to 16 bits of its largest magnitude and splits it into
// two signed digits, in the orders in which lanes hold weights. The compiler defines BATCH, TYPE
// and THREADS.
#pragma once

#include "basic.cuh"

constexpr int kBatch = BATCH;
constexpr int kType = TYPE;
// A step's activations of one vector: high digits, low digits; 4 column quarters; 2 halves; 4
// bytes.
constexpr int kStepBytes = 64;
// Columns that a thread rounds at a time: four triples, and three words of raw units.
constexpr int kDozen = 12;
// The largest magnitude whose two balanced digits both fit int8.
constexpr float kLargest = 32639.0f;
// The bits of the largest finite magnitude.
constexpr u32 kFinite = 0x7f7fffffu;
// Adding this to an integer of less than 22 bits leaves the integer plus 2^15 in the low 16 bits.
constexpr float kToBits = 12582912.0f + 32768.0f;
constexpr u32 kBias = 32768;

class Vector {
 public:
  using Bits = typename Stored<kType>::Bits;

  __device__ __forceinline__ Vector(const void* x, int vector, int columns,
                                    const float* column_scale)
      : x_(static_cast<const Bits*>(x) + vector * (columns / 4)),
        column_scale_(reinterpret_cast<const float4*>(column_scale)),
        count_(columns / 4) {}

  // Requests a dozen neighbours.
  __device__ __forceinline__ void read(int dozen, Bits (&bits)[3]) const {
#pragma unroll
    for (int k = 0; k < 3; ++k) bits[k] = x_[min(dozen * 3 + k, count_ - 1)];
  }

  // Scales a dozen neighbours; those behind the vector's end become zero.
  __device__ __forceinline__ void scale(int dozen, const Bits (&bits)[3],
                                        float (&values)[kDozen]) const {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const float4 four = Stored<kType>::values(bits[k]);
      values[4 * k] = four.x;
      values[4 * k + 1] = four.y;
      values[4 * k + 2] = four.z;
      values[4 * k + 3] = four.w;
    }
    if (column_scale_ != nullptr) {
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const float4 scale = __ldg(&column_scale_[min(dozen * 3 + k, count_ - 1)]);
        values[4 * k] *= scale.x;
        values[4 * k + 1] *= scale.y;
        values[4 * k + 2] *= scale.z;
        values[4 * k + 3] *= scale.w;
      }
    }
    if (dozen * 3 + 3 > count_) {
#pragma unroll
      for (int i = 0; i < kDozen; ++i) {
        if (dozen * 3 + i / 4 >= count_) values[i] = 0;
      }
    }
  }

 private:
  const Bits* x_;
  const float4* column_scale_;
  int count_;
};

// Two numbers of 16 bits with 2^15 added to each, and the same with their high digits rounded: a
// number is 256 high + low with low in [-128, 128).
struct Pair {
  u32 low;
  u32 high;

  __device__ __forceinline__ Pair(u32 first, u32 second)
      : low(__byte_perm(first, second, 0x5410)), high(low + 0x00800080u) {}

  // Adds both to a total, including the 2^15 that was added to each.
  __device__ __forceinline__ u32 sum(u32 total) const {
    asm("dp2a.lo.u32.u32 %0, %1, %2, %0;" : "+r"(total) : "r"(low), "r"(0x0101u));
    return total;
  }
};

// The sum of a dozen, including what was added to its numbers.
__device__ __forceinline__ u32 sum_of(const u32 (&rounded)[kDozen]) {
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < kDozen; i += 2) sum = Pair(rounded[i], rounded[i + 1]).sum(sum);
  return sum;
}

// Stores the digits of a dozen in the order of raw units: by quarter, half, and step. There is room
// for `words` times four neighbours of every vector.
__device__ __forceinline__ void store_raws(u8* raws, int words, int dozen, int vector,
                                           const u32 (&rounded)[kDozen]) {
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int i = dozen * 3 + k;
    if (i >= words) break;
    const Pair first(rounded[4 * k], rounded[4 * k + 1]);
    const Pair second(rounded[4 * k + 2], rounded[4 * k + 3]);
    u32* to = reinterpret_cast<u32*>(raws + (i / 8 * kBatch + vector) * kStepBytes + i % 4 * 8 +
                                     i / 4 % 2 * 4);
    to[0] = __byte_perm(first.high, second.high, 0x7531u) ^ 0x80808080u;
    to[8] = __byte_perm(first.low, second.low, 0x6420u);
  }
}

// Where digits are stored.
struct DigitsOut {
  u8* triples;
  int triple_dozens;
  u8* raws;
  int raw_words;

  __device__ __forceinline__ int dozens() const { return max(triple_dozens, (raw_words + 2) / 3); }

  // Stores the digits of a dozen; returns their sum, including what was added to them.
  __device__ __forceinline__ u32 store(int dozen, int vector, const u32 (&rounded)[kDozen]) const {
    const u32 sum = store_triples(dozen, vector, rounded);
    if (raw_words != 0) store_raws(raws, raw_words, dozen, vector, rounded);
    return sum;
  }

 private:
  // Stores the digits of a dozen in the order of triples; returns their sum, including what was
  // added to them. Two lanes hold one step: one stores its high digits, the other its low digits.
  __device__ __forceinline__ u32 store_triples(int dozen, int vector,
                                               const u32 (&rounded)[kDozen]) const {
    const bool odd = dozen % 2 != 0;
    const Pair thirds[2] = {{rounded[2], rounded[5]}, {rounded[8], rounded[11]}};
    u32 sum = thirds[0].sum(thirds[1].sum(0));
    u32 digits[2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Pair two(rounded[3 * j], rounded[3 * j + 1]);
      const Pair& third = thirds[j / 2];
      const u32 order = j % 2 * 0x2000u;
      sum = two.sum(sum);
      // A word's first byte stays 0, because table entries hold the length of their code there.
      digits[0][j] =
          (__byte_perm(two.high, third.high, 0x5310u + order) ^ 0x80808000u) & 0xffffff00u;
      digits[1][j] = __byte_perm(two.low, third.low, 0x4200u + order) & 0xffffff00u;
    }
    u32 other[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      other[j] = __shfl_xor_sync(~0u, odd ? digits[0][j] : digits[1][j], 1);
    }
    if (dozen >= triple_dozens) return sum;
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
};

// Threads that round the vectors of a block: kGroups groups of kThreads, each with a vector of its
// own at a time.
template <int kGroups, int kThreads>
struct Rounding {
  static constexpr int kWarps = kThreads / kLanes;
  static_assert(kThreads % kLanes == 0 && kGroups * kThreads <= THREADS && kGroups < 16);

  __device__ static __forceinline__ int group() { return threadIdx.x / kThreads; }

  // The largest value among the threads of a group, which meet at a barrier of their own.
  __device__ static __forceinline__ u32 max(u32 value, u32* scratch) {
    value = __reduce_max_sync(~0u, value);
    if (threadIdx.x % kLanes == 0) scratch[threadIdx.x / kLanes] = value;
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group()), "n"(kThreads) : "memory");
    return __reduce_max_sync(~0u, scratch[group() * kWarps + threadIdx.x % kLanes % kWarps]);
  }
};

// What a block keeps about the rounded vectors.
struct Rounded {
  float scale[kBatch];
  int sum[kBatch];
  u32 largest[2][THREADS / kLanes];
};

// Rounds a vector and stores its digits. NaN and infinity make its scale NaN. All warps call
// meanwhile() once they have requested what they round; warps that belong to no group round
// nothing, so they can do longer work there. `turn` counts the vectors that the group has rounded.
// The block must meet at a barrier before digits are read.
template <int kGroups, int kThreads, class Out, class Meanwhile>
__device__ __forceinline__ void round_vector(const Vector& x, int vector, int turn, const Out& out,
                                             Rounded& rounded, Meanwhile meanwhile) {
  using Groups = Rounding<kGroups, kThreads>;
  constexpr int kKept = 2;  // turns whose bits stay in registers
  const int lane = threadIdx.x % kLanes;
  const int dozens = out.dozens();
  const int first = threadIdx.x - Groups::group() * kThreads;
  Vector::Bits kept[kKept][3];
#pragma unroll
  for (int part = 0; part < kKept; ++part) x.read(first + part * kThreads, kept[part]);
  meanwhile();
  if (Groups::group() >= kGroups) return;
  if (first == 0) rounded.sum[vector] = 0;  // before the barrier behind which the group adds to it
  u32 largest_bits = 0;
  const auto compare = [&](int dozen, const Vector::Bits(&bits)[3]) {
    float values[kDozen];
    x.scale(dozen, bits, values);
#pragma unroll
    for (float value : values) {
      largest_bits = max(largest_bits, __float_as_uint(value) & 0x7fffffffu);
    }
  };
  if (first - lane < dozens) compare(first, kept[0]);
#pragma unroll 1
  for (int i = first + kThreads; i - lane < dozens; i += kThreads) {
    compare(i, kept[1]);
    if (i - lane + kThreads < dozens) x.read(i + kThreads, kept[1]);
  }
  if (dozens > kKept * kThreads) x.read(first + kThreads, kept[1]);
  largest_bits = Groups::max(largest_bits, rounded.largest[turn % 2]);
  const bool finite = largest_bits <= kFinite;
  const float largest = __uint_as_float(largest_bits);
  // Scaling by an exact power of two keeps the inverse of a tiny magnitude finite.
  const bool tiny = largest < 0x1p-60f;
  float inverse = 0;
  if (finite && largest_bits != 0) inverse = kLargest / (tiny ? largest * 0x1p100f : largest);
  u32 sum = 0;
#pragma unroll 1
  for (int i = first; i - lane < dozens; i += kThreads) {
    float values[kDozen];
    x.scale(i, kept[0], values);
#pragma unroll
    for (int k = 0; k < 3; ++k) kept[0][k] = kept[1][k];
    if (i - lane + kKept * kThreads < dozens) x.read(i + kKept * kThreads, kept[1]);
    if (tiny) {
#pragma unroll
      for (float& value : values) value *= 0x1p100f;
    }
    u32 numbers[kDozen];
#pragma unroll
    for (int j = 0; j < kDozen; ++j) {
      numbers[j] = __float_as_uint(__fmaf_rn(values[j], inverse, kToBits));
    }
    sum += out.store(i, vector, numbers) - kDozen * kBias;
  }
  const int total = __reduce_add_sync(~0u, static_cast<int>(sum));
  if (lane == 0) atomicAdd(&rounded.sum[vector], total);
  if (first == 0) {
    rounded.scale[vector] = finite ? largest / kLargest : __int_as_float(0x7fc00000);
  }
}
