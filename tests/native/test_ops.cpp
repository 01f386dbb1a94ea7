// The arithmetic between the products in buffers of exactly the size it may touch, with every
// instruction set and the same bits.
#include <algorithm>
#include <cmath>

#include "kernels/float_kernels.hpp"
#include "ops/ops.hpp"
#include "support.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// Heap memory of exactly `size` floats, for AddressSanitizer to guard.
using Floats = std::unique_ptr<float[]>;

Floats random_floats(Random& random, std::size_t size) {
  Floats floats(new float[size]);
  for (std::size_t i = 0; i < size; ++i) {
    floats[i] = static_cast<float>(random.byte()) / 64.0f - 2.0f;
  }
  return floats;
}

// Runs `body(kernels, out)` on copies of `out` with every instruction set; results must be equal.
template <class Body>
void agree(const char* what, const Floats& out, std::size_t size, Body body) {
  std::vector<float> expected;
  static const std::vector<const Kernels*> kKernels = all_kernels();
  for (const Kernels* isa : kKernels) {
    const Floats found(new float[size]);
    std::copy_n(out.get(), size, found.get());
    body(*isa->floats, found.get());
    if (expected.empty()) expected.assign(found.get(), found.get() + size);
    require(std::memcmp(expected.data(), found.get(), size * sizeof(float)) == 0,
            std::string(what) + " with " + isa->name);
  }
}

void check_elementwise(Random& random) {
  const std::size_t count = 1 + random.below(100);
  const Floats x = random_floats(random, count), y = random_floats(random, count);
  agree("rms_norm", x, count, [&](const FloatKernels& floats, float* out) {
    floats.rms_norm(x.get(), y.get(), count, 1e-5f, out);
  });
  agree("swiglu", x, count, [&](const FloatKernels& floats, float* out) {
    floats.swiglu(x.get(), y.get(), count, out);
  });
  agree("geglu", x, count, [&](const FloatKernels& floats, float* out) {
    floats.geglu(x.get(), y.get(), count, out);
  });
  agree("rotate", x, count, [&](const FloatKernels& floats, float* out) {
    floats.rotate(out, y.get(), y.get() + count - count / 2, count / 2);
  });
  agree("spread", x, count,
        [&](const FloatKernels& floats, float* out) { floats.spread(out, count); });
  agree("round_to_int8", x, count, [&](const FloatKernels& floats, float* out) {
    const std::unique_ptr<std::int8_t[]> integers(new std::int8_t[count]);
    const float scale = floats.round_to_int8(x.get(), count, integers.get());
    for (std::size_t i = 0; i < count; ++i) {
      out[i] = scale * static_cast<float>(integers[i]);
      require(std::abs(out[i] - x[i]) <= 0.5001f * scale, "round_to_int8 is a step off");
    }
  });
}

// The same buffer of exact size for each type of the cache.
struct Cached {
  Floats floats;
  std::unique_ptr<std::uint16_t[]> halves;
  std::unique_ptr<std::int8_t[]> integers;

  Cached(Random& random, std::size_t count)
      : floats(random_floats(random, count)),
        halves(new std::uint16_t[count]),
        integers(new std::int8_t[count]) {
    kPortableFloatKernels.round_to_half(floats.get(), count, halves.get());
    kPortableFloatKernels.round_to_int8(floats.get(), count, integers.get());
  }

  // From one of the elements on.
  const void* of(CacheType type, std::size_t first = 0) const {
    if (type == CacheType::kFloat32) return floats.get() + first;
    return type == CacheType::kFloat16 ? static_cast<const void*>(halves.get() + first)
                                       : integers.get() + first;
  }
};

// Every half is the nearest to itself and to what lies less than half a step away.
void check_halves() {
  std::vector<float> exact;
  for (std::uint32_t half = 0; half < 0x7c00; ++half) {
    exact.push_back(std::ldexp(static_cast<float>(half & 0x3ff) + (half < 0x400 ? 0.0f : 1024.0f),
                               static_cast<int>(half < 0x400 ? 1 : half >> 10) - 25));
  }
  std::vector<float> x(exact.begin(), exact.end());
  for (std::size_t i = 0; i + 1 < exact.size(); ++i) {
    x.push_back(-(0.45f * exact[i] + 0.55f * exact[i + 1]));
    x.push_back((exact[i] + exact[i + 1]) / 2);
  }
  x.push_back(1e9f);
  std::vector<std::uint16_t> expected(exact.size());
  for (std::size_t i = 0; i < exact.size(); ++i) expected[i] = static_cast<std::uint16_t>(i);
  for (std::size_t i = 0; i + 1 < exact.size(); ++i) {
    expected.push_back(static_cast<std::uint16_t>(0x8000 | (i + 1)));
    expected.push_back(static_cast<std::uint16_t>(i + i % 2));
  }
  expected.push_back(0x7bff);
  for (const Kernels* isa : all_kernels()) {
    std::vector<std::uint16_t> found(x.size());
    isa->floats->round_to_half(x.data(), x.size(), found.data());
    require(found == expected, std::string("round_to_half with ") + isa->name);
  }
}

void check_attention(Random& random) {
  const std::size_t rows = 1 + random.below(kAttentionRows);
  const std::size_t head_dim = 1 + random.below(100);
  const std::size_t length = rows + random.below(random.coin() ? 20 : 600);
  const Floats queries = random_floats(random, rows * head_dim);
  const Cached keys(random, head_dim * length), values(random, head_dim * length);
  const Floats key_scales = random_floats(random, length);
  const Floats value_scales = random_floats(random, length);
  AttentionTile tile{};
  tile.type = static_cast<CacheType>(random.below(3));
  tile.rows = rows;
  tile.head_dim = head_dim;
  tile.scale = 0.125f;
  const bool has_scales = tile.type == CacheType::kInt8;
  const PositionRun whole{length,
                          keys.of(tile.type),
                          length,
                          values.of(tile.type),
                          has_scales ? key_scales.get() : nullptr,
                          has_scales ? value_scales.get() : nullptr};
  tile.runs = &whole;
  tile.run_count = 1;
  for (std::size_t row = 0; row < rows; ++row) {
    tile.queries[row] = queries.get() + row * head_dim;
    tile.lasts[row] = length - rows + row + 1;
    tile.firsts[row] = random.coin() ? 0 : random.below(tile.lasts[row]);
  }
  const Floats scratch(new float[attention_scratch(head_dim)]);
  tile.scratch = scratch.get();
  const std::unique_ptr<std::int16_t[]> integers(new std::int16_t[attention_integers(head_dim)]);
  tile.integers = integers.get();
  const Floats before = random_floats(random, rows * head_dim);
  agree("attend", before, rows * head_dim, [&](const FloatKernels& floats, float* out) {
    for (std::size_t row = 0; row < rows; ++row) tile.outputs[row] = out + row * head_dim;
    floats.attend(tile);
  });
  if (length <= kPositionsAtOnce) return;
  // Two runs give what one gives, if no window moves the blocks.
  for (std::size_t row = 0; row < rows; ++row) tile.firsts[row] = 0;
  constexpr std::size_t first = kPositionsAtOnce;
  const PositionRun split[2] = {
      {first, whole.keys, length, whole.values, whole.key_scales, whole.value_scales},
      {length - first, keys.of(tile.type, first), length, values.of(tile.type, first * head_dim),
       has_scales ? whole.key_scales + first : nullptr,
       has_scales ? whole.value_scales + first : nullptr}};
  std::vector<float> found[2];
  for (const std::size_t count : {1, 2}) {
    tile.runs = count == 1 ? &whole : split;
    tile.run_count = count;
    std::vector<float>& out = found[count - 1];
    out.resize(rows * head_dim);
    for (std::size_t row = 0; row < rows; ++row) tile.outputs[row] = out.data() + row * head_dim;
    kernels().floats->attend(tile);
  }
  require(found[0] == found[1], "attention over two runs");
}

// Several sequences in one call, some of them behind positions that others have: each gives what it
// gives alone, from buffers of exactly the size that it may read.
void check_sequences(ThreadPool& pool, Random& random) {
  const std::size_t kv_heads = 1 + random.below(3), heads = kv_heads * (1 + random.below(3));
  const std::size_t head_dim = 1 + random.below(40), width = heads * head_dim;
  const std::size_t count = 1 + random.below(5);
  std::vector<Floats> buffers;
  const auto positions = [&](std::size_t length) {
    CachedPositions cache{};
    cache.length = length;
    cache.keys = buffers.emplace_back(random_floats(random, kv_heads * head_dim * length)).get();
    cache.values = buffers.emplace_back(random_floats(random, kv_heads * head_dim * length)).get();
    cache.key_head_stride = cache.value_head_stride = head_dim * length;
    cache.key_stride = length;
    return cache;
  };
  const std::vector<CachedPositions> shared = {positions(kPositionsAtOnce),
                                               positions(2 * kPositionsAtOnce)};
  std::vector<Attention> ops(count);
  std::vector<Floats> expected;
  for (Attention& op : ops) {
    op.tokens = random.below(6);
    op.token_stride = width;
    op.heads = heads;
    op.head_dim = head_dim;
    op.kv_heads = kv_heads;
    op.cache = positions(op.tokens + random.below(300));
    op.earlier = std::span(shared).first(random.below(3));
    const std::size_t size = op.tokens * width;
    op.queries = buffers.emplace_back(random_floats(random, size)).get();
    op.out = expected.emplace_back(new float[size]).get();
    run(pool, std::span<const Attention>(&op, 1));
  }
  for (Attention& op : ops) {
    op.out = buffers.emplace_back(random_floats(random, op.tokens * width)).get();
  }
  run(pool, std::span<const Attention>(ops));
  for (std::size_t i = 0; i < count; ++i) {
    require(std::equal(ops[i].out, ops[i].out + ops[i].tokens * width, expected[i].get()),
            "attention of several sequences");
  }
}

}  // namespace

int main() {
  check_halves();
  ThreadPool one(1), three(3);
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    check_elementwise(random);
    check_attention(random);
    check_sequences(random.coin() ? one : three, random);
  }
  std::puts("ops: all instruction sets agree");
}
