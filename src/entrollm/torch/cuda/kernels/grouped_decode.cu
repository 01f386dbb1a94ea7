// Decodes a matrix with group scales, or some of its rows, to memory, rounding after each operation
// as the format says. A thread takes eight neighbours at a time. The compiler defines TYPE of the
// output (0 float32, 1 bfloat16, 2 float16), THREADS, ARITHMETIC (1 float32, 2 float16, 3
// bfloat16), FACTOR (1 if weights have a factor), and what groups.cuh needs.
#include "groups.cuh"

namespace {

constexpr int kUnitPieces = kUnitColumns / kPieceColumns;

struct Launch {
  Matrix matrix;
  const long long* rows;  // for each block the row to decode, within the matrix; null for all
  void* out;              // (blocks, columns)
};

// The words of a unit that hold a piece of it.
struct Words {
  const Matrix& matrix;
  long long unit;

  __device__ __forceinline__ u32 eight(int i) const { return __ldg(matrix.eights + unit * 8 + i); }
  __device__ __forceinline__ u32 four(int i) const { return __ldg(matrix.fours + unit * 4 + i); }
  __device__ __forceinline__ u32 two(int i) const { return __ldg(matrix.twos + unit * 2 + i); }
  __device__ __forceinline__ u32 one() const { return __ldg(matrix.ones + unit); }
};

__device__ __forceinline__ float rounded(float value) {
  if constexpr (ARITHMETIC == 1) return value;
  u16 bits;
  if constexpr (ARITHMETIC == 2) {
    asm("{\n .reg .b16 h;\n cvt.rn.f16.f32 h, %1;\n mov.b16 %0, h;\n}" : "=h"(bits) : "f"(value));
    return number<2>(bits);
  }
  asm("{\n .reg .b16 h;\n cvt.rn.bf16.f32 h, %1;\n mov.b16 %0, h;\n}" : "=h"(bits) : "f"(value));
  return number<3>(bits);
}

__device__ __forceinline__ float weight(const Matrix& matrix, const Group& group, float value) {
  if constexpr (ZERO != 0 || CONSTANT_ZERO != 0) {
    value = rounded(__fsub_rn(value, group.zero_value(matrix)));
  }
  value = rounded(__fmul_rn(value, group.scale_value()));
  if constexpr (MINIMUM != 0) value = rounded(__fsub_rn(value, group.minimum_value()));
  if constexpr (FACTOR != 0) value = rounded(__fmul_rn(value, matrix.factor));
  return value;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
    decode_grouped(const __grid_constant__ Launch launch) {
  const Matrix& matrix = launch.matrix;
  const int pieces = (matrix.columns + kPieceColumns - 1) / kPieceColumns;
  const long long item = blockIdx.x;
  const long long row = launch.rows == nullptr ? item : launch.rows[item];
#pragma unroll 1
  for (int piece = threadIdx.x; piece < pieces; piece += THREADS) {
    const int column = piece * kPieceColumns;
    const Words words{matrix, row * matrix.units + piece / kUnitPieces};
    float values[kPieceColumns];
    Group group;
    group.load(matrix, row, group_of(column));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 bytes = quad_bytes(words, piece % kUnitPieces * 2 + half);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = half * 4 + i;
        if (SIZE % kPieceColumns != 0 && at > 0) group.load(matrix, row, group_of(column + at));
        values[at] = weight(matrix, group, value_of(bytes, i));
      }
    }
    const long long begin = item * matrix.columns + column;
    if (matrix.columns % kPieceColumns == 0) {
      store_piece<TYPE>(static_cast<u8*>(launch.out) + begin * (TYPE == 0 ? 4 : 2), values);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kPieceColumns; ++i) {
      if (column + i < matrix.columns) store_value(launch.out, begin + i, values[i], TYPE);
    }
  }
}
