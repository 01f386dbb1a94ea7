// Decodes a lossless bfloat16 matrix, or some of its rows, to memory: a tile, or a row, per block.
// The compiler defines TYPE of the output (0 float32, 1 bfloat16, 2 float16) and THREADS.
#include "lossless.cuh"

namespace {

constexpr int kPieceWords = kPieceColumns / 2;
constexpr int kWarps = THREADS / kLanes;
constexpr int kPatchedRows = kTileRows / kWarps;  // of a warp

struct Launch {
  LosslessMatrix matrix;
  const long long* rows;  // rows to decode, each within the matrix; null for all
  u8* out;                // (rows, columns)
  int columns;
};

// Stores the bits of a weight in the type of the output.
__device__ __forceinline__ void store_bits(u8* out, long long at, u32 bits) {
  if constexpr (TYPE == 1) {
    reinterpret_cast<u16*>(out)[at] = static_cast<u16>(bits);
  } else {
    store_value(out, at, __uint_as_float(bits << 16), TYPE);
  }
}

// Writes eight neighbours, as far as there are columns.
__device__ __forceinline__ void write_piece(const Launch& launch, long long begin, int column,
                                            const u32 (&words)[kPieceWords]) {
  if (launch.columns % kPieceColumns != 0) {
#pragma unroll
    for (int i = 0; i < kPieceColumns; ++i) {
      if (column + i >= launch.columns) break;
      store_bits(launch.out, begin + column + i, words[i / 2] >> i % 2 * 16);
    }
    return;
  }
  if (column >= launch.columns) return;
  u8* out = launch.out + (begin + column) * (TYPE == 0 ? 4 : 2);
  if constexpr (TYPE == 1) {
    *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    float values[kPieceColumns];
#pragma unroll
    for (int i = 0; i < kPieceWords; ++i) {
      values[2 * i] = __uint_as_float(words[i] << 16);
      values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    store_piece<TYPE>(out, values);
  }
}

template <int kQuarter>
__device__ __forceinline__ void write_quarters(const Launch& launch, const Stripe& stripe, u32 base,
                                               const long long (&begins)[2], const bool (&exist)[2],
                                               int column) {
  if constexpr (kQuarter < kQuarters) {
    u32 words[kQuarterSteps][kStepWords];
    stripe.unpack<kQuarter>(base, words);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32(&first)[kStepWords] = words[2 * half];
      const u32(&second)[kStepWords] = words[2 * half + 1];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (!exist[row]) continue;
        const u32 piece[kPieceWords] = {first[row], first[row + 2], second[row], second[row + 2]};
        write_piece(launch, begins[row],
                    column + kQuarter * kQuarterColumns + half * (kQuarterColumns / 2), piece);
      }
    }
    write_quarters<kQuarter + 1>(launch, stripe, base, begins, exist, column);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
    decode_lossless(const __grid_constant__ Launch launch) {
  const LosslessMatrix& matrix = launch.matrix;
  const int only = launch.rows == nullptr ? -1 : static_cast<int>(launch.rows[blockIdx.x]);
  const int tile = only < 0 ? blockIdx.x : only / kTileRows;
  const auto exists = [&](int row) { return only < 0 ? row < matrix.rows : row == only; };
  const auto begin_of = [&](int row) {
    return static_cast<long long>(only < 0 ? row : blockIdx.x) * launch.columns;
  };
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  const int row = tile * kTileRows + lane / 4;
  const long long begins[2] = {begin_of(row), begin_of(row + 8)};
  const bool exist[2] = {exists(row), exists(row + 8)};
  const u32 base = both_halves(matrix.bases[tile]);
  int patches[kPatchedRows];  // of a warp's rows, the first that is left
#pragma unroll
  for (int i = 0; i < kPatchedRows; ++i) {
    patches[i] = matrix.patch_begins[tile * kTileRows + warp + i * kWarps];
  }
#pragma unroll 1
  for (int first = 0; first < matrix.stripes; first += kWarps) {
    if (first + warp < matrix.stripes) {
      Stripe stripe;
      const long long at = static_cast<long long>(tile) * matrix.stripes + first + warp;
#pragma unroll
      for (int piece = 0; piece < kStripePieces; ++piece) {
        stripe.load(piece, matrix.data + at * (kStripePieces * kLanes) + lane);
      }
      const int column = (first + warp) * kStripeColumns + lane % 4 * 8;
      write_quarters<0>(launch, stripe, base, begins, exist, column);
    }
    __syncthreads();  // a patched weight is written again, while it is in the cache
#pragma unroll
    for (int i = 0; i < kPatchedRows; ++i) {
      const int patched = tile * kTileRows + warp + i * kWarps;
      if (!exists(patched)) continue;
      const int end = matrix.patch_begins[patched + 1];
      for (bool more = true; more;) {
        const int at = patches[i] + lane;
        const u32 patch = at < end ? matrix.patches[at] : 0;
        const int column = patch & 0xffffu;
        const bool now = at < end && column < (first + kWarps) * kStripeColumns;
        if (now) store_bits(launch.out, begin_of(patched) + column, patch >> 16);
        const u32 all = __ballot_sync(~0u, now);
        patches[i] += __popc(all);
        more = all == ~0u;
      }
    }
  }
}
