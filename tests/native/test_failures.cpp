// Every allocation of every operation fails in turn: an exception comes out, and the same threads
// then compute the same numbers. It needs a linker that can wrap calloc.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>

#include "coded_case.hpp"
#include "layer/blocks.hpp"
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
    op.cache.keys = op.cache.values = const_cast<float*>(values.data());
    op.cache.key_head_stride = op.cache.value_head_stride = kDim * kTokens;
    op.cache.key_stride = kTokens;
    op.tokens = op.cache.length = kTokens;
    op.heads = op.kv_heads = kHeads;
    op.head_dim = kDim;
    op.out = out.data();
    run(pool, std::span<const Attention>(&op, 1));
    return out;
  });
}

// A layer on two sequences, one with a prompt and one with a token after others.
void check_layer(const CodedMatrix& matrix, std::size_t threads) {
  constexpr std::size_t kFeatures = 32, kDim = 8, kTokens = 5;
  const AnyMatrix any = &matrix;
  const std::vector<float> norm(kFeatures, 0.5f), x((kTokens + 1) * kFeatures, 0.25f);
  const JoinedProduct qkv("qkv", std::vector<AnyMatrix>{any, any}, {});
  const JoinedProduct square("square", std::vector<AnyMatrix>{any}, {});
  const Surroundings around{norm, norm, 1e-5f, 0.5f};
  const AttentionBlock attention(qkv, square, around, {4, 2, kDim, 2.0f}, {});
  const FeedForwardBlock feed_forward(qkv, square, around, Gate::kGelu);
  fail_each_allocation("layer", threads, [&](ThreadPool& pool) {
    std::vector<float> keys(2 * 2 * kDim * kTokens), values(keys), y(x), z(x);
    const std::size_t half = keys.size() / 2;
    const std::size_t head = kDim * kTokens;
    const auto cache = [&](std::size_t at) {
      return CachedPositions{CacheType::kFloat32, kTokens, keys.data() + at, head,    kTokens,
                             values.data() + at,  head,    nullptr,          nullptr, 0};
    };
    const SequenceCache caches[] = {{kTokens, cache(0), {}, {}}, {1, cache(half), 2, {}}};
    attention.run(pool, x.data(), kTokens + 1, {}, caches, y.data());
    feed_forward.run(pool, y.data(), kTokens + 1, z.data());
    z.insert(z.end(), keys.begin(), keys.end());
    return z;
  });
}

CodedCase square_case(Random& random, const RandomCode& source) {
  CodedCase c(random, source);
  c.geometry = {32, 32, 4, kVector};
  c.symbols.resize(32 * 32);
  for (auto& symbol : c.symbols) symbol = source.symbol(random, 0);
  c.rows = encode_rows(c.code, c.geometry, c.symbols.data());
  if (!c.code.has_sparse()) c.rows.sparse_sizes.clear();
  return c;
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
  Random random(7);
  const CodedCase c = square_case(random, RandomCode(random));
  const ExactBuffer dense = pad(c.rows.dense);
  const ExactBuffer sparse = pad(c.rows.sparse);
  check_layer(CodedMatrix(c.code, c.geometry, dense.span(), sparse.span(), c.rows.sparse_sizes,
                          {c.scale, c.offset, {}}),
              3);
  check_attention(3);
  std::printf("failures: %zu allocations failed, and all were passed on\n", failures);
  require(failures > 500, "allocations fail");
}
