// y = W x for up to 32 vectors and flat matrices. Fields are loaded to registers ahead of the
// products, the first before the previous kernel of the stream has ended, and multiplied by the
// matrix unit. The compiler defines what flat_work.cuh needs.
#include "flat_work.cuh"

namespace {

// Requests the digits of a block's columns that flat_prepare.cu has made.
__device__ __forceinline__ void copy_digits(u8* to, const u8* from, int size) {
  const u32 address = shared_address(to);
#pragma unroll 4
  for (int at = threadIdx.x * 16; at < size; at += THREADS * 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + at), "l"(from + at)
                 : "memory");
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply_flat(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) u8 memory[];
  State& state = *reinterpret_cast<State*>(memory);
  u8* digits = memory + STATE_BYTES;
  int index = 0;
  int y_tiles = 0;  // tiles of the matrices before
  while (index + 1 < launch.count &&
         static_cast<int>(blockIdx.x) >= launch.matrices[index + 1].cta_begin) {
    y_tiles += launch.matrices[index].tiles;
    ++index;
  }
  const FlatMatrix& matrix = launch.matrices[index];
  const int block = blockIdx.x - matrix.cta_begin;
  const int group = launch.splits.divide(block);
  const int split = block - group * launch.splits;
  const int first = launch.splits.divide(matrix.stripes * split);
  const int tiles = group < matrix.tiles ? matrix.groups.divide(matrix.tiles - 1 - group) + 1 : 0;
  const int range = launch.splits.divide(matrix.stripes * (split + 1)) - first;
  const Work work{matrix, launch, group,          matrix.groups, tiles,
                  first,  range,  launch.vectors, nullptr};

  // What does not depend on the previous kernel is requested first.
  Reader reader(work);
  Fields ahead[kAhead];
  reader.next(ahead[0]);
  // With more requested, x would arrive last.
  const auto read_ahead = [&] {
#pragma unroll
    for (int i = 1; i < kAhead; ++i) reader.next(ahead[i]);
  };
  begin_block(work, state);
  wait_for_previous();
  if constexpr (kPrepared) {
    copy_digits(digits, launch.digits + static_cast<long long>(first) * kDigitBytes,
                work.range * kDigitBytes);
    if (threadIdx.x < kBatch) {
      state.rounded.scale[threadIdx.x] = __ldcg(&launch.scales[threadIdx.x]);
      state.rounded.sum[threadIdx.x] = __ldcg(&launch.totals[threadIdx.x]);
    }
    read_ahead();
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    const FlatDigits out{digits, matrix.stripes * (kStripeColumns / 4)};
    const auto vector = [&](int i) {
      return Vector(launch.x, i, launch.columns, matrix.column_scale);
    };
    round_vectors(vector, out, state.rounded, read_ahead);
  }
  __syncthreads();
  let_next_begin();
  multiply_tiles(work, state, digits, reader, ahead, y_tiles);
}
