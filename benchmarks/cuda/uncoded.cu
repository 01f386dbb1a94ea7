// The baselines: y = W x with integers that are not coded, BITS of them 8, with a scale for each
// row, or 4, with a scale for every 128 columns of a row. A warp takes ROWS rows at a time;
// activations are rounded to int8 in the kernel. Loads run AHEAD steps before the products, across
// the ends of rows, and the first are issued before the kernel waits for the one before it.
typedef unsigned int u32;

constexpr int kLaneColumns = 128 / BITS;  // of a load of 16 bytes
constexpr int kStepColumns = 32 * kLaneColumns;
constexpr int kWords = kLaneColumns / 4;  // of four digits, for a load

__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

__device__ __forceinline__ u32 load_scale(const unsigned short* from) {
  unsigned short v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(from));
  return v;
}

__device__ __forceinline__ u32 rounded(uint2 four, float inverse) {
  const int a = __float2int_rn(__uint_as_float(four.x << 16) * inverse);
  const int b = __float2int_rn(__uint_as_float(four.x & 0xffff0000u) * inverse);
  const int c = __float2int_rn(__uint_as_float(four.y << 16) * inverse);
  const int d = __float2int_rn(__uint_as_float(four.y & 0xffff0000u) * inverse);
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | static_cast<u32>(d) << 24;
}

// Where the digits of columns 4 i .. 4 i + 3 lie, in words: lanes read 16 bytes side by side. Of 4-bit
// weights a word holds columns 0 .. 3 of eight in its lower halves of bytes, 4 .. 7 in its upper ones.
__device__ __forceinline__ int place(int i) {
  if (BITS == 8) return i;
  return i / 256 * 256 + i % 2 * 128 + i % 256 / 8 * 4 + i % 8 / 2;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    multiply_uncoded(const signed char* weights, const void* scale, const unsigned short* x,
                     unsigned short* y, int rows, int columns) {
  extern __shared__ __align__(16) signed char digits[];
  __shared__ float scratch[WARPS];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int stride = gridDim.x * WARPS * ROWS;
  int row = (blockIdx.x * WARPS + warp) * ROWS;
  const int steps = columns / kStepColumns;  // a multiple of AHEAD
  const unsigned short* scales = static_cast<const unsigned short*>(scale);
  int load_row = row;
  int load_step = 0;
  const auto load = [&](uint4* to, u32* scale_to) {
    const int from_row = min(load_row, rows - ROWS);
    const uint4* from = reinterpret_cast<const uint4*>(
                            weights + static_cast<long long>(from_row) * columns * BITS / 8) +
                        load_step * 32 + lane;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      to[r] = load_once(from + r * (columns / kLaneColumns));
      if (BITS == 4)
        scale_to[r] = load_scale(scales + (from_row + r) * (columns / 128) + load_step * 8 + lane / 4);
    }
    if (++load_step == steps) {
      load_step = 0;
      load_row += stride;
    }
  };
  uint4 ahead[AHEAD][ROWS];
  u32 scale_ahead[AHEAD][ROWS];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) load(ahead[i], scale_ahead[i]);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  float largest = 0;
  for (int i = threadIdx.x; i < columns / 4; i += WARPS * 32) {
    const uint2 four = reinterpret_cast<const uint2*>(x)[i];
    largest = fmaxf(largest, fmaxf(fabsf(__uint_as_float(four.x << 16)),
                                   fabsf(__uint_as_float(four.x & 0xffff0000u))));
    largest = fmaxf(largest, fmaxf(fabsf(__uint_as_float(four.y << 16)),
                                   fabsf(__uint_as_float(four.y & 0xffff0000u))));
  }
  for (int s = 16; s > 0; s /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
  if (lane == 0) scratch[warp] = largest;
  __syncthreads();
  largest = scratch[lane % WARPS];
  for (int s = WARPS / 2; s > 0; s /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int i = threadIdx.x; i < columns / 4; i += WARPS * 32)
    reinterpret_cast<u32*>(digits)[place(i)] = rounded(reinterpret_cast<const uint2*>(x)[i], inverse);
  __syncthreads();
  for (; row < rows; row += stride) {
    int sums[ROWS] = {};
    float scaled[ROWS] = {};
    for (int step = 0; step < steps; step += AHEAD) {
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        int d[kWords];
#pragma unroll
        for (int part = 0; part < kWords / 4; ++part)
          *reinterpret_cast<int4*>(d + 4 * part) =
              reinterpret_cast<const int4*>(digits)[((step + i) * (kWords / 4) + part) * 32 + lane];
        uint4 now[ROWS];
        float factor[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          now[r] = ahead[i][r];
          factor[r] = __uint_as_float(scale_ahead[i][r] << 16);
        }
        load(ahead[i], scale_ahead[i]);
        int total = 0;  // of the digits: 4-bit weights are stored with 8 added
#pragma unroll
        for (int k = 0; k < kWords; ++k) total = __dp4a(d[k], 0x01010101, total);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const int words[4] = {static_cast<int>(now[r].x), static_cast<int>(now[r].y),
                                static_cast<int>(now[r].z), static_cast<int>(now[r].w)};
          if (BITS == 8) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[r] = __dp4a(words[k], d[k], sums[r]);
          } else {
            int sum = -8 * total;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              sum = __dp4a(words[k] & 0x0f0f0f0f, d[k], sum);
              sum = __dp4a(words[k] >> 4 & 0x0f0f0f0f, d[(k + 4) % kWords], sum);
            }
            scaled[r] += factor[r] * sum;
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float value = BITS == 8 ? sums[r] : scaled[r];
      for (int s = 16; s > 0; s /= 2) value += __shfl_xor_sync(~0u, value, s);
      if (lane == 0) {
        value *= largest / 127.0f;
        if (BITS == 8) value *= static_cast<const float*>(scale)[row + r];
        asm("{\n .reg .b16 h;\n cvt.rn.bf16.f32 h, %0;\n st.global.b16 [%1], h;\n}" ::"f"(value),
            "l"(y + row + r)
            : "memory");
      }
    }
  }
}
