// Every allocation of every operation fails in turn: an exception comes out, and the same threads
// then compute the same numbers. It needs a linker that can wrap calloc.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>

#include "coded_case.hpp"
#include "ops/ops.hpp"
#include "product/flat_matrix.hpp"
#include "product/grouped.hpp"
#include "product/product.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

std::atomic<long> left{-1};  // allocations until one fails; none does while it is negative

bool fails() {
  if (left.load(std::memory_order_relaxed) < 0) return false;
  return left.fetch_sub(1) == 0;
}

void* allocate(std::size_t size, std::size_t alignment) {
  void* memory = nullptr;
  if (!fails()) {
    memory = alignment == 0
                 ? std::malloc(std::max<std::size_t>(size, 1))
                 : std::aligned_alloc(alignment, (size + alignment) / alignment * alignment);
  }
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size, 0); }
void* operator new[](std::size_t size) { return allocate(size, 0); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

extern "C" {
void* __real_calloc(std::size_t count, std::size_t size);
void* __wrap_calloc(std::size_t count, std::size_t size);
void* __wrap_calloc(std::size_t count, std::size_t size) {
  return fails() ? nullptr : __real_calloc(count, size);
}
}

namespace {

std::size_t failures = 0;

// What `operation` leaves in a buffer, on threads whose buffers are new.
using Operation = std::function<std::vector<float>(ThreadPool&)>;

void fail_each_allocation(const char* name, std::size_t threads, const Operation& operation) {
  ThreadPool reference(threads);
  const std::vector<float> expected = operation(reference);
  // The first call on a new pool allocates the buffers of its threads, so each attempt gets one.
  // How many tasks a thread takes differs from attempt to attempt, and so does the number of
  // allocations: it ends when several attempts in a row have met none that fails.
  int quiet = 0;
  for (long n = 0; quiet < 5; ++n) {
    std::vector<float> found;
    std::thread caller([&] {  // has buffers, too
      ThreadPool pool(threads);
      bool failed = false;
      left = n;
      try {
        found = operation(pool);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      const bool spent = left.exchange(-1) < 0;
      require(failed || !spent, std::string(name) + ": a failure is passed on");
      quiet = failed ? 0 : quiet + 1;
      failures += failed;
      found = operation(pool);
    });
    caller.join();
    require(found == expected, std::string(name) + ": the threads go on as before");
  }
}

std::vector<float> product_of(ThreadPool& pool, const AnyMatrix& matrix, const CodedCase& c,
                              std::size_t batch) {
  std::vector<float> y(batch * c.geometry.rows);
  const AnyMatrix matrices[] = {matrix, matrix};
  std::vector<float> both(2 * y.size());
  multiply(pool, matrices, c.x.data(), batch, both.data());
  return both;
}

void check_matrix(const CodedCase& c, const CodedMatrix& matrix, std::size_t threads) {
  const Geometry& geometry = c.geometry;
  for (const std::size_t batch : {std::size_t{1}, std::size_t{3}, c.batch}) {
    if (batch > c.batch) continue;
    fail_each_allocation("coded product", threads,
                         [&](ThreadPool& pool) { return product_of(pool, &matrix, c, batch); });
    fail_each_allocation("flat product", threads, [&](ThreadPool& pool) {
      const FlatMatrix flat(pool, matrix);
      return product_of(pool, &flat, c, batch);
    });
  }
  const std::vector<std::int64_t> rows{0, 1, 2, 3, 2, 1, 0};
  fail_each_allocation("rows", threads, [&](ThreadPool& pool) {
    std::vector<float> values(rows.size() * geometry.columns);
    matrix.dequantize(pool, rows, values.data());
    const FlatMatrix flat(pool, matrix);
    flat.dequantize(pool, rows, values.data());
    Bytes symbols(c.symbols.size());
    matrix.decode(pool, 0, geometry.rows, symbols.data());
    values.insert(values.end(), symbols.begin(), symbols.end());
    return values;
  });
  for (const std::size_t size : {std::size_t{32}, std::size_t{37}}) {
    const std::size_t groups = (geometry.columns - 1) / size + 1;
    const std::vector<float> scale(geometry.rows * groups, 0.25f);
    fail_each_allocation("grouped product", threads, [&](ThreadPool& pool) {
      GroupScales scales{size, {}, {}};
      scales.terms.groups = groups;
      scales.terms.scale.values = scale.data();
      GroupedMatrix grouped(matrix, std::move(scales));
      const GroupedMatrix* const matrices[] = {&grouped};
      std::vector<float> y(2 * c.batch * geometry.rows);
      multiply_grouped(pool, matrices, c.x.data(), c.batch, y.data());
      grouped.flatten(pool);
      multiply_grouped(pool, matrices, c.x.data(), c.batch, y.data() + y.size() / 2);
      return y;
    });
  }
}

void check_attention(std::size_t threads) {
  constexpr std::size_t kTokens = 300, kHeads = 2, kDim = 16;
  const std::vector<float> values(kTokens * kHeads * kDim, 0.5f);
  fail_each_allocation("attention", threads, [&](ThreadPool& pool) {
    std::vector<float> out(values.size());
    Attention op{};
    op.queries = values.data();
    op.token_stride = kHeads * kDim;
    op.keys = values.data();
    op.key_head_stride = kDim * kTokens;
    op.key_stride = kTokens;
    op.values = values.data();
    op.value_head_stride = kDim * kTokens;
    op.tokens = op.length = kTokens;
    op.heads = op.kv_heads = kHeads;
    op.head_dim = kDim;
    op.out = out.data();
    run(pool, op);
    return out;
  });
}

}  // namespace

int main() {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    Random random(seed);
    const RandomCode source(random);
    CodedCase c(random, source);
    while (c.geometry.rows < 4 || c.batch < 3) c = CodedCase(random, source);
    const ExactBuffer dense = pad(c.rows.dense);
    const ExactBuffer sparse = pad(c.rows.sparse);
    const CodedMatrix matrix(c.code, c.geometry, dense.span(), sparse.span(), c.rows.sparse_sizes,
                             {c.scale, c.offset, {}});
    check_matrix(c, matrix, seed % 2 == 0 ? 3 : 1);
  }
  check_attention(3);
  std::printf("failures: %zu allocations failed, and all were passed on\n", failures);
  require(failures > 500, "allocations fail");
}
