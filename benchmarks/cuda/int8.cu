// The baseline: y = W x with int8 weights in rows, two rows of a warp at a time, activations
// rounded to int8 in the kernel. Loads of the first weights are issued before the kernel waits for
// the one before it.
typedef unsigned int u32;

constexpr int kWarps = 8;
constexpr int kRows = 2;
constexpr int kAhead = 4;  // steps of 512 columns that loads run ahead

__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

extern "C" __global__ void __launch_bounds__(kWarps * 32)
    multiply_int8(const signed char* weights, const float* scale, const unsigned short* x,
                  unsigned short* y, int rows, int columns) {
  extern __shared__ __align__(16) signed char digits[];
  __shared__ float scratch[kWarps];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int stride = gridDim.x * kWarps * kRows;
  int row = (blockIdx.x * kWarps + warp) * kRows;
  const int steps = columns / 512;  // a multiple of kAhead
  // Where the lane's loads come from; they run kAhead steps before the products, across the ends of
  // rows.
  int load_row = row;
  int load_step = 0;
  const auto load = [&](uint4* to) {
    const uint4* from =
        reinterpret_cast<const uint4*>(
            weights + static_cast<long long>(min(load_row, rows - kRows)) * columns) +
        load_step * 32 + lane;
#pragma unroll
    for (int r = 0; r < kRows; ++r) to[r] = load_once(from + r * (columns / 16));
    if (++load_step == steps) {
      load_step = 0;
      load_row += stride;
    }
  };
  uint4 ahead[kAhead][kRows];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(ahead[i]);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  float largest = 0;
  for (int i = threadIdx.x; i < columns / 2; i += kWarps * 32) {
    const u32 pair = reinterpret_cast<const u32*>(x)[i];
    largest = fmaxf(largest, fmaxf(fabsf(__uint_as_float(pair << 16)),
                                   fabsf(__uint_as_float(pair & 0xffff0000u))));
  }
  for (int s = 16; s > 0; s /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
  if (lane == 0) scratch[warp] = largest;
  __syncthreads();
  largest = scratch[lane % kWarps];
  for (int s = 4; s > 0; s /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int i = threadIdx.x; i < columns / 4; i += kWarps * 32) {
    const uint2 four = reinterpret_cast<const uint2*>(x)[i];
    const int a = __float2int_rn(__uint_as_float(four.x << 16) * inverse);
    const int b = __float2int_rn(__uint_as_float(four.x & 0xffff0000u) * inverse);
    const int c = __float2int_rn(__uint_as_float(four.y << 16) * inverse);
    const int d = __float2int_rn(__uint_as_float(four.y & 0xffff0000u) * inverse);
    reinterpret_cast<u32*>(digits)[i] =
        (a & 255) | (b & 255) << 8 | (c & 255) << 16 | static_cast<u32>(d) << 24;
  }
  __syncthreads();
  for (; row < rows; row += stride) {
    int sums[kRows] = {};
    for (int step = 0; step < steps; step += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int4 d = reinterpret_cast<const int4*>(digits)[(step + i) * 32 + lane];
        uint4 now[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) now[r] = ahead[i][r];
        load(ahead[i]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          sums[r] = __dp4a(static_cast<int>(now[r].x), d.x, sums[r]);
          sums[r] = __dp4a(static_cast<int>(now[r].y), d.y, sums[r]);
          sums[r] = __dp4a(static_cast<int>(now[r].z), d.z, sums[r]);
          sums[r] = __dp4a(static_cast<int>(now[r].w), d.w, sums[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      for (int s = 16; s > 0; s /= 2) sums[r] += __shfl_xor_sync(~0u, sums[r], s);
      if (lane == 0) {
        const float value = sums[r] * (largest / 127.0f) * scale[row + r];
        asm("{\n .reg .b16 h;\n cvt.rn.bf16.f32 h, %0;\n st.global.b16 [%1], h;\n}" ::"f"(value),
            "l"(y + row + r)
            : "memory");
      }
    }
  }
}
