// Decodes a flat matrix, or some of its rows, to memory: a tile, or a row, per block. The compiler
// defines TYPE of the output, THREADS, and what flat.cuh needs.
#include "flat.cuh"

namespace {

struct Launch {
  FlatMatrix matrix;
  const long long* rows;  // rows to decode, each within the matrix; null for all
  const int* positions;   // of each row of the matrix among the rows of all tiles
  u8* out;                // (rows, columns)
  int columns;
};

// A row of the output.
struct Target {
  long long begin;
  bool exists;
};

template <int kBits>
__device__ __forceinline__ void write_stripe(const Launch& launch, const TileHead& head,
                                             const Fields& fields, const Target& target,
                                             int column) {
  const int lane = threadIdx.x % kLanes;
  const bool odd = lane & 1;
  const Row& row = head.rows[lane / 4 + (odd ? 8 : 0)];
  const bool whole = launch.columns % kPieceColumns == 0 && launch.matrix.column_scale == nullptr;
#pragma unroll
  for (int pair = 0; pair < kStripeWords / 2; ++pair) {
    // A lane has four neighbours of two rows. Two lanes exchange them for eight of one.
    const u32 upper = fields.unpacked<kBits>(2 * pair);
    const u32 lower = fields.unpacked<kBits>(2 * pair + 1);
    const u32 other = __shfl_xor_sync(~0u, odd ? upper : lower, 1);
    const u32 base = static_cast<u32>(head.base & 255) * 0x01010101u;
    const uint2 bytes =
        make_uint2(__vadd4(odd ? other : upper, base), __vadd4(odd ? lower : other, base));
    const int at = column + pair * 16 + lane % 4 / 2 * 8;
    if (!target.exists || at >= launch.columns) continue;
    float values[kPieceColumns];
    scale_piece(bytes, row.scale, row.offset, values);
    if (whole) {
      store_piece<TYPE>(launch.out + (target.begin + at) * (TYPE == 0 ? 4 : 2), values);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kPieceColumns; ++i) {
      if (at + i >= launch.columns) break;
      const float* scale = launch.matrix.column_scale;
      const float value = scale == nullptr ? values[i] : values[i] * __ldg(&scale[at + i]);
      store_value(launch.out, target.begin + at + i, value, TYPE);
    }
  }
}

template <int kBits>
__device__ __forceinline__ void write_any(const Launch& launch, const TileHead& head,
                                          const Fields& fields, int bits, const Target& target,
                                          int column) {
  if (kBits == kMinBits || bits == kBits) {
    write_stripe<kBits>(launch, head, fields, target, column);
  } else if constexpr (kBits > kMinBits) {
    write_any<kBits - 1>(launch, head, fields, bits, target, column);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    decode_flat(const __grid_constant__ Launch launch) {
  const FlatMatrix& matrix = launch.matrix;
  const int position =
      launch.rows == nullptr ? blockIdx.x * kTileRows : launch.positions[launch.rows[blockIdx.x]];
  const int tile = position / kTileRows;
  const int only = launch.rows == nullptr ? -1 : position % kTileRows;
  const TileHead& head = matrix.heads[tile];
  const TilePlace place(matrix, tile);
  // The row of the output that row `row` of the tile is decoded to.
  const auto target_of = [&](int row) {
    const bool exists = only < 0 ? tile * kTileRows + row < matrix.rows : row == only;
    const long long out = only < 0 ? head.rows[row].index : blockIdx.x;
    return Target{out * launch.columns, exists};
  };
  const int lane = threadIdx.x % kLanes;
  const Target target = target_of(lane / 4 + (lane & 1 ? 8 : 0));
  for (int stripe = threadIdx.x / kLanes; stripe < matrix.stripes; stripe += THREADS / kLanes) {
    Fields fields;
    fields.load(place.data + stripe * place.bits * kLanes, place.bits);
    write_any<kMaxBits>(launch, head, fields, place.bits, target, stripe * kStripeColumns);
  }
  __syncthreads();  // a patched weight is written again
  for (int i = head.patch_begin + threadIdx.x; i < head.patch_end; i += THREADS) {
    const u32 patch = matrix.patches[i];
    const int row = patch & 15;
    const int difference = static_cast<int>(patch >> 4 & 511) - 256;
    const int column = patch >> 13;
    const Target at = target_of(row);
    if (!at.exists) continue;
    // Fields of patched symbols are the nearest that there are.
    const int field = difference > 0 ? (1 << place.bits) - 1 : 0;
    const float symbol = static_cast<float>(head.base + field + difference);
    float value = __fadd_rn(__fmul_rn(symbol, head.rows[row].scale), head.rows[row].offset);
    if (matrix.column_scale != nullptr) value *= __ldg(&matrix.column_scale[column]);
    store_value(launch.out, at.begin + column, value, TYPE);
  }
}
