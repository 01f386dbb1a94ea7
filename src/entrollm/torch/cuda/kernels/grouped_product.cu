// y = W x for a few vectors and a matrix with group scales. Integers are unpacked in registers and
// multiplied in float32. A warp takes ROWS rows at a time, and each of its lanes one unit of every
// row in a step of 32 units. Loads run AHEAD steps before the products. The compiler defines BATCH,
// TYPE of x and y (0 float32, 1 bfloat16, 2 float16), THREADS, ROWS, AHEAD, and what groups.cuh
// needs; SIZE is a multiple of 8.
#include "groups.cuh"

namespace {

constexpr int kBatch = BATCH;
constexpr int kRows = ROWS;
constexpr int kAhead = AHEAD;
// Groups of a unit. Larger groups are added up unit by unit.
constexpr int kParts = SIZE % 32 == 0 ? 1 : SIZE % 16 == 0 ? 2 : 4;
constexpr int kPartQuads = kQuads / kParts;
constexpr int kStepColumns = kLanes * kUnitColumns;
// Whether products need the sums of activations in each group.
constexpr bool kNeedsSums = MINIMUM != 0 || kFloatZero || (VALUES != 0 && kIntegerZero);

struct Launch {
  Matrix matrix;
  const void* x;
  void* y;
  int columns;  // a multiple of 4; x has zeros where the matrix has no column
  int y_stride;
  int panel_steps;  // steps whose activations are in shared memory together
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
__device__ __forceinline__ void load_panel(const Launch& launch, int begin, int count,
                                           float4* panel) {
  using Bits = typename Stored<TYPE>::Bits;
  const int quads = launch.columns / 4;
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
          static_cast<const Bits*>(launch.x)[static_cast<long long>(vector) * quads + quad]);
    }
    panel[i] = values;
  }
}

struct Sums {
  float rows[kRows][kBatch];
};

// Adds the products of a unit of every row; `x` are a lane's activations in the step.
__device__ __forceinline__ void multiply_units(const Matrix& matrix, const Unit (&units)[kRows],
                                               const float4* x, int vector_stride, Sums& sums) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float products[kRows][kBatch] = {};
    float totals[kBatch] = {};
    float lifted[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      lifted[r] = kIntegerZero && VALUES == 0 ? -(kLift + units[r].groups[part].zero_value(matrix))
                                              : -kLift;
    }
#pragma unroll
    for (int quad = part * kPartQuads; quad < (part + 1) * kPartQuads; ++quad) {
      float four[kBatch][4];
#pragma unroll
      for (int vector = 0; vector < kBatch; ++vector) {
        const float4 read = x[vector * vector_stride + quad * kLanes];
        four[vector][0] = read.x;
        four[vector][1] = read.y;
        four[vector][2] = read.z;
        four[vector][3] = read.w;
        if constexpr (kNeedsSums) totals[vector] += (read.x + read.y) + (read.z + read.w);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const u32 bytes = quad_bytes(units[r], quad);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = value_of(bytes, i, lifted[r]);
#pragma unroll
          for (int vector = 0; vector < kBatch; ++vector) {
            products[r][vector] = __fmaf_rn(value, four[vector][i], products[r][vector]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Group& group = units[r].groups[part];
      const float scale = group.scale_value();
#pragma unroll
      for (int vector = 0; vector < kBatch; ++vector) {
        float product = products[r][vector];
        if constexpr (kFloatZero || (VALUES != 0 && kIntegerZero)) {
          product = __fmaf_rn(-group.zero_value(matrix), totals[vector], product);
        }
        float& sum = sums.rows[r][vector];
        sum = __fmaf_rn(scale, product, sum);
        if constexpr (MINIMUM != 0) sum = __fmaf_rn(-group.minimum_value(), totals[vector], sum);
      }
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply_grouped(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(16) float4 panel[];
  const Matrix& matrix = launch.matrix;
  const int lane = threadIdx.x % kLanes;
  const int warps = gridDim.x * (THREADS / kLanes);
  const int steps = (matrix.units + kLanes - 1) / kLanes;
  const int sets = (matrix.rows + kRows - 1) / kRows;
  // Warps of a block take turns together, since they share the panel.
  const int turns = (sets + warps - 1) / warps;
  // Neighbouring rows go to different multiprocessors, so that each has equal work.
  const int first_set = threadIdx.x / kLanes * gridDim.x + blockIdx.x;
  Unit ahead[kAhead][kRows];
  const auto load = [&](Unit(&units)[kRows], int set, int step) {
    const int unit = min(step * kLanes + lane, matrix.units - 1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      units[r].load(matrix, min(set * kRows + r, matrix.rows - 1), unit);
    }
  };
  const auto load_all = [&](int set) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(ahead[i], set, i);
  };
  load_all(first_set);
  wait_for_previous();
  const int panel_steps = launch.panel_steps;
  const bool whole = panel_steps >= steps;
  if (whole) {
    load_panel(launch, 0, steps, panel);
    __syncthreads();
  }
  let_next_begin();
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int set = first_set + turn * warps;
    if (turn > 0) load_all(set);
    Sums sums = {};
    int begin = 0;
    int count = steps;
#pragma unroll 1
    for (int step = 0; step < steps; step += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (step + i >= steps) break;
        if (!whole && (step + i) % panel_steps == 0) {
          begin = step + i;
          count = min(panel_steps, steps - begin);
          __syncthreads();
          load_panel(launch, begin, count, panel);
          __syncthreads();
        }
        Unit now[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) now[r] = ahead[i][r];
        if (step + i + kAhead < steps) load(ahead[i], set, step + i + kAhead);
        const float4* x = panel + (step + i - begin) * kQuads * kLanes + lane;
        // A lane past the last unit reads that one again, and its activations are zeros.
        multiply_units(matrix, now, x, count * kQuads * kLanes, sums);
      }
    }
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
        if (lane == 0 && row < matrix.rows) {
          store_value(launch.y, static_cast<long long>(vector) * launch.y_stride + row,
                      sum * matrix.factor, TYPE);
        }
      }
    }
  }
}
