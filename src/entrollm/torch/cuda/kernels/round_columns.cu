// Rounds a block of columns to integers, the last one first, each compensating for the errors of
// those rounded before it: a row per thread. The compiler defines COLUMNS, the most that a block
// has, and THREADS.

namespace {

struct Launch {
  const float* left;        // (columns, rows), what is to be rounded, in units of the steps
  const float* reach;       // (columns, columns), what 1 in a column takes from those before it
  const float* thresholds;  // (255), ascending; the k-th lies between k - 128 and k - 127
  float* integers;          // (columns, rows)
  int columns;
  int rows;
  long long left_stride;
  long long reach_stride;
};

constexpr int kThresholds = 255;
constexpr float kLowest = -128.0f;

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) round_columns(const Launch launch) {
  __shared__ float reach[COLUMNS][COLUMNS];
  __shared__ float thresholds[kThresholds];
  for (int at = threadIdx.x; at < COLUMNS * COLUMNS; at += THREADS) {
    const int i = at / COLUMNS, j = at % COLUMNS;
    const bool exists = j < i && i < launch.columns;
    reach[i][j] = exists ? launch.reach[i * launch.reach_stride + j] : 0.0f;
  }
  for (int at = threadIdx.x; at < kThresholds; at += THREADS)
    thresholds[at] = launch.thresholds[at];
  __syncthreads();

  const int row = blockIdx.x * THREADS + threadIdx.x;
  if (row >= launch.rows) return;
  float left[COLUMNS];  // in registers, since all loops over it are unrolled
#pragma unroll
  for (int i = 0; i < COLUMNS; ++i) {
    left[i] = i < launch.columns ? launch.left[i * launch.left_stride + row] : 0.0f;
  }
#pragma unroll
  for (int i = COLUMNS - 1; i >= 0; --i) {
    if (i >= launch.columns) continue;
    float integer = fminf(fmaxf(floorf(left[i]), kLowest), kLowest + kThresholds - 1);
    if (left[i] > thresholds[static_cast<int>(integer - kLowest)]) integer += 1.0f;
    launch.integers[static_cast<long long>(i) * launch.rows + row] = integer;
    // Rounded twice, as separate operations on arrays are.
#pragma unroll
    for (int j = 0; j < i; ++j) left[j] = __fsub_rn(left[j], __fmul_rn(reach[i][j], integer));
  }
}
