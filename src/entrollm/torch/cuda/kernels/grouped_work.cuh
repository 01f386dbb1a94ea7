// What products with group scales share. Integers are unpacked in registers and multiplied in
// float32. A warp takes ROWS rows at a time, and each of its lanes one unit of every row in a step
// of 32 units. Loads run AHEAD steps before the products. The compiler defines BATCH, TYPE of x and
// y (0 float32, 1 bfloat16, 2 float16), THREADS, ROWS, AHEAD, and what groups.cuh needs; SIZE is a
// multiple of 8.
#pragma once

#include "groups.cuh"

namespace {

constexpr int kBatch = BATCH;
constexpr int kRows = ROWS;
constexpr int kAhead = AHEAD;
// Groups of a unit. Larger groups are added up unit by unit.
constexpr int kParts = SIZE % 32 == 0 ? 1 : SIZE % 16 == 0 ? 2 : 4;
constexpr int kPartQuads = kQuads / kParts;
constexpr int kStepColumns = kLanes * kUnitColumns;
// A product is of kBase + kShare * value, which is faster to make than the value, and the sums of
// activations in each group take that back.
constexpr float kBase = kSmall ? 1.0f : 0.0f;
constexpr float kShare = kSmall ? 1.0f / 128 : VALUES == 1 ? 1.0f / 256 : 1.0f;
constexpr bool kNeedsSums = kSmall || MINIMUM != 0 || ZERO != 0 || CONSTANT_ZERO != 0;

struct Vectors {
  const void* x;
  void* y;
  int columns;  // a multiple of 4; x has zeros where the matrix has no column
  int y_stride;
  int panel_steps;  // steps whose activations are in shared memory together
};

// What a block works on: every so many of the rows of a matrix.
struct Work {
  const Matrix& matrix;
  const Vectors& all;
  int block;  // among those of the matrix
  int blocks;
  int y_begin;         // where its outputs begin in a vector of outputs
  int vectors;         // that have an output
  const int* outputs;  // where each vector's output is among all; null if they are in order
  const int* inputs;   // the same for inputs

  // Where the input of a vector is. Vectors that do not exist have that of the first.
  __device__ __forceinline__ long long input(int vector) const {
    return inputs == nullptr ? vector : inputs[vector < vectors ? vector : 0];
  }

  __device__ __forceinline__ long long output(int vector) const {
    return outputs == nullptr ? vector : outputs[vector];
  }
};

__device__ __forceinline__ uint4 load_once(const u32* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// A unit of a row with the scales of its groups.
struct Unit {
  u32 words[BITS];
  Group groups[kParts];

  __device__ __forceinline__ void load(const Matrix& matrix, long long row, int unit) {
    const long long at = row * matrix.units + unit;
    int next = 0;
    if constexpr (BITS == 8) {
      set(next, load_once(matrix.eights + at * 8));
      set(next, load_once(matrix.eights + at * 8 + 4));
    }
    if constexpr (BITS != 8 && (BITS & 4) != 0) set(next, load_once(matrix.fours + at * 4));
    if constexpr ((BITS & 2) != 0) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(matrix.twos) + at);
      words[next++] = two.x;
      words[next++] = two.y;
    }
    if constexpr ((BITS & 1) != 0) words[next] = __ldg(matrix.ones + at);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      groups[part].load(matrix, row,
                        group_of(unit * kUnitColumns + part * (kUnitColumns / kParts)));
    }
  }

  __device__ __forceinline__ u32 eight(int i) const { return words[i]; }
  __device__ __forceinline__ u32 four(int i) const { return words[i]; }
  __device__ __forceinline__ u32 two(int i) const { return words[(BITS & 4) + i]; }
  __device__ __forceinline__ u32 one() const { return words[BITS - 1]; }

 private:
  __device__ __forceinline__ void set(int& next, uint4 four) {
    words[next] = four.x;
    words[next + 1] = four.y;
    words[next + 2] = four.z;
    words[next + 3] = four.w;
    next += 4;
  }
};

// Brings the activations of steps [begin, begin + count) to shared memory: by vector, step and
// quad, with those of 32 lanes side by side.
__device__ __forceinline__ void load_panel(const Work& work, int begin, int count, float4* panel) {
  using Bits = typename Stored<TYPE>::Bits;
  const int quads = work.all.columns / 4;
  const int each = count * kQuads * kLanes;
#pragma unroll 1
  for (int i = threadIdx.x; i < each * kBatch; i += THREADS) {
    const int vector = i / each;
    const int inside = i - vector * each;
    const int step = begin + inside / (kQuads * kLanes);
    const int quad = (step * kLanes + inside % kLanes) * kQuads + inside / kLanes % kQuads;
    float4 values = make_float4(0, 0, 0, 0);
    if (quad < quads) {
      values = Stored<TYPE>::values(
          static_cast<const Bits*>(work.all.x)[work.input(vector) * quads + quad]);
    }
    panel[i] = values;
  }
  if constexpr (kNeedsSums) {
    __syncthreads();
    float* sums = reinterpret_cast<float*>(panel + each * kBatch);
    const int groups = count * kParts * kLanes;
#pragma unroll 1
    for (int i = threadIdx.x; i < groups * kBatch; i += THREADS) {
      const float4* from = panel + i / kLanes * kPartQuads * kLanes + i % kLanes;
      float sum = 0;
#pragma unroll
      for (int quad = 0; quad < kPartQuads; ++quad) {
        const float4 four = from[quad * kLanes];
        sum += (four.x + four.y) + (four.z + four.w);
      }
      sums[i] = sum;
    }
  }
}

struct Sums {
  float rows[kRows][kBatch];
};

// The number that byte `i` of a quad gives, of which the base and the share are taken back.
__device__ __forceinline__ float quick_value(u32 bytes, int i) {
  if constexpr (kSmall) return small_value(bytes, i);
  if constexpr (VALUES != 0) return half_value(half_pair(bytes, i / 2) >> i % 2 * 16);
  return value_of(bytes, i);
}

// Adds the products of a unit of every row; `x` are a lane's activations in the step, and `totals`
// their sums.
__device__ __forceinline__ void multiply_units(const Matrix& matrix, const Unit (&units)[kRows],
                                               const float4* x, const float* totals, int count,
                                               Sums& sums) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float products[kRows][kBatch] = {};
#pragma unroll
    for (int quad = part * kPartQuads; quad < (part + 1) * kPartQuads; ++quad) {
      u32 bytes[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        bytes[r] = quad_bytes(units[r], quad) | (kSmall ? kSmallLift : 0);
      }
      float4 four[kBatch];
#pragma unroll
      for (int vector = 0; vector < kBatch; ++vector) {
        four[vector] = x[vector * count * kQuads * kLanes + quad * kLanes];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float values[4] = {quick_value(bytes[r], 0), quick_value(bytes[r], 1),
                                 quick_value(bytes[r], 2), quick_value(bytes[r], 3)};
#pragma unroll
        for (int vector = 0; vector < kBatch; ++vector) {
          float& product = products[r][vector];
          product = __fmaf_rn(values[0], four[vector].x, product);
          product = __fmaf_rn(values[1], four[vector].y, product);
          product = __fmaf_rn(values[2], four[vector].z, product);
          product = __fmaf_rn(values[3], four[vector].w, product);
        }
      }
    }
    float total[kBatch];
    if constexpr (kNeedsSums) {
#pragma unroll
      for (int vector = 0; vector < kBatch; ++vector) {
        total[vector] = totals[(vector * count * kParts + part) * kLanes];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Group& group = units[r].groups[part];
      const float scale = group.scale_value() * (1.0f / kShare);
      const float zero = __fmaf_rn(group.zero_value(matrix), kShare, kBase);
#pragma unroll
      for (int vector = 0; vector < kBatch; ++vector) {
        float& sum = sums.rows[r][vector];
        float product = products[r][vector];
        if constexpr (kSmall || ZERO != 0 || CONSTANT_ZERO != 0) {
          product = __fmaf_rn(-zero, total[vector], product);
        }
        sum = __fmaf_rn(scale, product, sum);
        if constexpr (MINIMUM != 0) sum = __fmaf_rn(-group.minimum_value(), total[vector], sum);
      }
    }
  }
}

// Adds up what the lanes of a warp have, and writes it.
__device__ __forceinline__ void write_sums(const Work& work, int set, const Sums& sums) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int vector = 0; vector < kBatch; ++vector) {
      float sum = sums.rows[r][vector];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(~0u, sum, distance);
      }
      const int row = set * kRows + r;
      if (threadIdx.x % kLanes == 0 && row < work.matrix.rows && vector < work.vectors) {
        const long long begin = work.output(vector) * work.all.y_stride;
        store_value(work.all.y, begin + work.y_begin + row, sum * work.matrix.factor, TYPE);
      }
    }
  }
}

// Multiplies the rows of a block. ready() is called when the first are requested, before x is read.
template <class Ready>
__device__ __forceinline__ void multiply_rows(const Work& work, float4* panel, Ready ready) {
  const Matrix& matrix = work.matrix;
  const int lane = threadIdx.x % kLanes;
  const int warps = work.blocks * (THREADS / kLanes);
  const int steps = (matrix.units + kLanes - 1) / kLanes;
  const int sets = (matrix.rows + kRows - 1) / kRows;
  // Warps of a block take turns together, since they share the panel.
  const int items = (sets + warps - 1) / warps * steps;
  // Neighbouring rows go to different multiprocessors, so that each has equal work.
  int set = threadIdx.x / kLanes * work.blocks + work.block;
  int step = 0;
  int load_set = set;
  int load_step = 0;
  Unit ahead[kAhead][kRows];
  const auto load = [&](Unit(&units)[kRows]) {
    if (load_set >= sets) return;
    const int unit = min(load_step * kLanes + lane, matrix.units - 1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      units[r].load(matrix, min(load_set * kRows + r, matrix.rows - 1), unit);
    }
    if (++load_step == steps) {
      load_step = 0;
      load_set += warps;
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(ahead[i]);
  ready();
  const int panel_steps = work.all.panel_steps;
  int begin = 0;
  int count = min(panel_steps, steps);
  if (panel_steps >= steps) {
    load_panel(work, 0, steps, panel);
    __syncthreads();
  }
  let_next_begin();
  Sums sums = {};
#pragma unroll 1
  for (int item = 0; item < items; item += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (item + i >= items) break;
      if (panel_steps < steps && step % panel_steps == 0) {
        begin = step;
        count = min(panel_steps, steps - begin);
        __syncthreads();
        load_panel(work, begin, count, panel);
        __syncthreads();
      }
      Unit now[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) now[r] = ahead[i][r];
      load(ahead[i]);
      // A lane past the last unit has that one again, and its activations are zeros.
      const float4* x = panel + (step - begin) * kQuads * kLanes + lane;
      const float* totals =
          reinterpret_cast<const float*>(panel + kBatch * count * kQuads * kLanes) +
          (step - begin) * kParts * kLanes + lane;
      multiply_units(matrix, now, x, totals, count, sums);
      if (++step == steps) {
        write_sums(work, set, sums);
        sums = {};
        step = 0;
        set += warps;
      }
    }
  }
}

}  // namespace
