// Baseline products for the benchmarks: int8, int4 and bf16 weights streamed at full width, and a
// plain read. Compiled by benchmarks/baselines.py with -march=native; C interface, own threads.
#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kPrefetchBytes = 2048;

void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p) + kPrefetchBytes, _MM_HINT_T0);
}

// One row of `columns` weights (a multiple of 512) against u8 x s8 or s4 x s8 or bf16 products.
float row_int8(const std::uint8_t* w, const std::int8_t* x, std::size_t columns) {
  __m512i sums[4];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (std::size_t i = 0; i < columns; i += 256) {
    for (std::size_t j = 0; j < 4; ++j) {
      prefetch(w + i + j * 64);
      sums[j] = _mm512_dpbusd_epi32(sums[j], _mm512_loadu_si512(w + i + j * 64),
                                    _mm512_loadu_si512(x + i + j * 64));
    }
  }
  sums[0] =
      _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
  return static_cast<float>(_mm512_reduce_add_epi32(sums[0]));
}

float row_int4(const std::uint8_t* w, const std::int8_t* x, std::size_t columns) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512i sums[4];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (std::size_t i = 0; i < columns; i += 256) {
    for (std::size_t j = 0; j < 2; ++j) {
      prefetch(w + i / 2 + j * 64);
      const __m512i packed = _mm512_loadu_si512(w + i / 2 + j * 64);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
      sums[2 * j] = _mm512_dpbusd_epi32(sums[2 * j], _mm512_and_si512(packed, low),
                                        _mm512_loadu_si512(x + i + j * 128));
      sums[2 * j + 1] =
          _mm512_dpbusd_epi32(sums[2 * j + 1], high, _mm512_loadu_si512(x + i + j * 128 + 64));
    }
  }
  sums[0] =
      _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
  return static_cast<float>(_mm512_reduce_add_epi32(sums[0]));
}

float row_bf16(const std::uint8_t* w, const float* x, std::size_t columns) {
  __m512 sums[4];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (std::size_t i = 0; i < columns; i += 64) {
    for (std::size_t j = 0; j < 4; ++j) {
      if (j % 2 == 0) prefetch(w + 2 * i + j * 32);
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 2 * i + j * 32));
      const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      sums[j] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + i + j * 16), sums[j]);
    }
  }
  sums[0] = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
  return _mm512_reduce_add_ps(sums[0]);
}

float row_read(const std::uint8_t* w, std::size_t size) {
  __m512i sum = _mm512_setzero_si512();
  for (std::size_t i = 0; i < size; i += 64) {
    prefetch(w + i);
    sum = _mm512_xor_si512(sum, _mm512_loadu_si512(w + i));
  }
  return static_cast<float>(_mm512_reduce_add_epi32(sum));
}

}  // namespace

// kind: 0 read, 1 int8, 2 int4, 3 bf16. Returns the elapsed seconds of one product over all rows.
extern "C" double baseline_product(int kind, const std::uint8_t* weights, std::size_t rows,
                                   std::size_t columns, const void* x, float* y, int threads) {
  const std::size_t row_bytes = kind == 2 ? columns / 2 : kind == 3 ? columns * 2 : columns;
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  const auto body = [&](std::size_t thread) {
    ++ready;
    while (!go) _mm_pause();
    const std::size_t parts = static_cast<std::size_t>(threads);
    for (std::size_t row = rows * thread / parts; row < rows * (thread + 1) / parts; ++row) {
      const std::uint8_t* w = weights + row * row_bytes;
      switch (kind) {
        case 0:
          y[row] = row_read(w, row_bytes);
          break;
        case 1:
          y[row] = row_int8(w, static_cast<const std::int8_t*>(x), columns);
          break;
        case 2:
          y[row] = row_int4(w, static_cast<const std::int8_t*>(x), columns);
          break;
        default:
          y[row] = row_bf16(w, static_cast<const float*>(x), columns);
      }
    }
  };
  std::vector<std::thread> workers;
  for (int thread = 1; thread < threads; ++thread) workers.emplace_back(body, thread);
  while (ready < threads - 1) _mm_pause();
  const auto start = std::chrono::steady_clock::now();
  go = true;
  body(0);
  for (auto& worker : workers) worker.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
