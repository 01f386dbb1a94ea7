// Rounds vectors for flat_product.cu, one in each block, while other blocks clear the sums that its
// blocks share.
// The compiler defines BATCH, TYPE of x, and THREADS.
#include "vector.cuh"

namespace {

struct Launch {
  const void* x;
  const float* column_scale;
  u8* digits;
  u16* numbers;
  float* scales;
  int* totals;
  uint4* cleared;
  int clear_pieces;  // of 16 bytes
  int vectors;
  int columns;
  int words;  // of four columns, padded to whole stripes
};

struct PreparedDigits {
  u8* raws;
  u16* numbers;
  int words;

  __device__ __forceinline__ int dozens() const { return (words + 2) / 3; }

  __device__ __forceinline__ u32 store(int dozen, int vector, const u32 (&rounded)[kDozen]) const {
    store_raws(raws, words, dozen, vector, rounded);
#pragma unroll
    for (int i = 0; i < kDozen; ++i) {
      const int column = dozen * kDozen + i;
      if (column < words * 4) numbers[column * kBatch + vector] = static_cast<u16>(rounded[i]);
    }
    return sum_of(rounded);
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
    prepare_flat(const __grid_constant__ Launch launch) {
  __shared__ Rounded rounded;
  const int vector = blockIdx.x;
  let_next_begin();
  wait_for_previous();
  if (vector >= kBatch) {
    // The other blocks.
    const int clearing = gridDim.x - kBatch;
    for (int i = (vector - kBatch) * THREADS + threadIdx.x; i < launch.clear_pieces;
         i += clearing * THREADS) {
      launch.cleared[i] = make_uint4(0, 0, 0, 0);
    }
    return;
  }
  const PreparedDigits out{launch.digits, launch.numbers, launch.words};
  if (vector < launch.vectors) {
    const Vector x(launch.x, vector, launch.columns, launch.column_scale);
    round_vector<1, THREADS>(x, vector, 0, out, rounded, [] {});
  } else {
    const u32 zeros[kDozen] = {kBias, kBias, kBias, kBias, kBias, kBias,
                               kBias, kBias, kBias, kBias, kBias, kBias};
    for (int i = threadIdx.x; i < out.dozens(); i += THREADS) out.store(i, vector, zeros);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool exists = vector < launch.vectors;
    launch.scales[vector] = exists ? rounded.scale[vector] : 0.0f;
    launch.totals[vector] = exists ? rounded.sum[vector] : 0;
  }
}
