// Every primitive of every instruction set against the scalar one, in buffers of the smallest size
// that the interface allows.
#include <algorithm>

#include "guarded.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

const std::vector<const Kernels*> kKernels = all_kernels();

// Buffers of one case. Inputs get junk in their slack, which must not matter.
class Case {
 public:
  explicit Case(Random& random) : random_(random), at_end_(random.coin()) {}

  std::uint8_t* noise(std::size_t size, std::size_t slack = kSlack) {
    Guarded& buffer = add(size + slack);
    for (std::size_t i = 0; i < buffer.size(); ++i) buffer.data()[i] = random_.byte();
    return buffer.data();
  }
  // Bits that are one with a chance of 0, 1/8, 1/2, 7/8 or 1.
  std::uint8_t* bits(std::size_t size) {
    std::uint8_t* data = noise(size);
    const std::size_t density = random_.below(5);
    for (std::size_t i = 0; i < size; ++i) {
      const auto other = static_cast<std::uint8_t>(random_.byte() & random_.byte());
      if (density == 0) data[i] = 0;
      if (density == 1) data[i] &= other;
      if (density == 3) data[i] |= other | random_.byte();
      if (density == 4) data[i] = 0xff;
    }
    return data;
  }
  std::uint8_t* copy(const Bytes& bytes) {
    std::uint8_t* data = noise(bytes.size());
    std::copy(bytes.begin(), bytes.end(), data);
    return data;
  }

 private:
  Guarded& add(std::size_t size) {
    buffers_.push_back(std::make_unique<Guarded>(size, at_end_));
    return *buffers_.back();
  }

  Random& random_;
  bool at_end_;
  std::vector<std::unique_ptr<Guarded>> buffers_;
};

// Runs `body(kernels, out)` with every instruction set; results and outputs must not differ.
template <class Body>
void agree(Case& buffers, const char* what, const Bytes& before, Body body) {
  std::size_t expected = 0;
  Bytes symbols;
  for (const Kernels* isa : kKernels) {
    std::uint8_t* out = buffers.copy(before);
    const std::size_t result = body(*isa, out);
    if (isa == kKernels.front()) {
      expected = result;
      symbols.assign(out, out + before.size());
    }
    require(result == expected && std::equal(symbols.begin(), symbols.end(), out),
            std::string(what) + ": " + isa->name + " agrees with scalar");
  }
}

std::size_t random_count(Random& random, std::size_t unit) {
  const std::size_t limit = (random.coin() ? 5 : 64) * kVector / unit;
  return unit * (1 + random.below(limit));
}

void test_field(Random& random, bool dense) {
  Case buffers(random);
  const std::size_t count = random_count(random, dense ? kVector : 1);
  const std::size_t kind = random.below(7);
  const int bits = kind == 6 ? 8 : static_cast<int>(kind + 1);
  const std::uint8_t* fields =
      buffers.bits(dense ? dense_bytes(count, bits) : sparse_bytes(count, bits));
  const std::uint8_t* table = buffers.noise(64, 0);
  FieldArgs args{fields, count, bits, table, nullptr};
  const auto run = [&](const Kernels& isa, std::uint8_t* out) {
    return (dense ? isa.dense_field : isa.sparse_field)(args, out);
  };
  agree(buffers, "a field", Bytes(count), run);
  if (bits == 8) return;
  // The child list holds exactly the escapes: any list serves to count them.
  Bytes symbols(count + kSlack);
  args.child = symbols.data();
  Bytes scratch(count + kSlack);
  args.child = buffers.noise(run(kScalarKernels, scratch.data()));
  agree(buffers, "a field with an escape", Bytes(count), run);
}

void test_split(Random& random) {
  Case buffers(random);
  const std::size_t count = random_count(random, 1);
  const std::uint8_t* plane = buffers.bits((count + 7) / 8);
  const std::size_t ones = kScalarKernels.count_all_ones(plane, count, 1);
  const std::uint8_t* left = buffers.noise(count - ones);
  const std::uint8_t* right = buffers.noise(ones);
  agree(buffers, "a split", Bytes(count), [&](const Kernels& isa, std::uint8_t* out) {
    isa.split(plane, count, left, right, out);
    return std::size_t{0};
  });
}

void test_low_bits(Random& random) {
  Case buffers(random);
  const std::size_t count = random_count(random, kVector);
  const int bits = 1 + static_cast<int>(random.below(6));
  const std::uint8_t* fields = buffers.bits(dense_bytes(count, bits));
  Bytes symbols(count);
  for (auto& symbol : symbols) symbol = static_cast<std::uint8_t>(random.byte() >> bits << bits);
  agree(buffers, "low bits", symbols, [&](const Kernels& isa, std::uint8_t* out) {
    isa.or_low_bits(fields, count, bits, out);
    return std::size_t{0};
  });
}

void test_count(Random& random) {
  Case buffers(random);
  const std::size_t count = random_count(random, 1);
  const int bits = 1 + static_cast<int>(random.below(6));
  const std::uint8_t* planes = buffers.bits(sparse_bytes(count, bits));
  agree(buffers, "a count of ones", {},
        [&](const Kernels& isa, std::uint8_t*) { return isa.count_all_ones(planes, count, bits); });
}

// Activations at the ends of their range as often as not.
struct Vector {
  Digits digits;
  std::vector<std::int64_t> sums{0};

  Vector(Random& random, Case& buffers, std::size_t count) {
    std::uint8_t* high = buffers.noise(count);
    std::uint8_t* low = buffers.noise(count);
    std::uint8_t* whole = buffers.noise(2 * count);
    const std::size_t kind = random.below(5);
    for (std::size_t i = 0; i < count; ++i) {
      int x = static_cast<int>(random.below(65280)) - 32640;
      if (kind == 1) x = 32639;
      if (kind == 2) x = -32768;
      if (kind == 3) x = x < 0 ? -32768 : 32639;
      if (kind == 4) x = x < 0 ? -128 : 127;
      const int high_digit = (x + 128) >> 8;
      const auto x16 = static_cast<std::int16_t>(x);
      high[i] = static_cast<std::uint8_t>(high_digit);
      low[i] = static_cast<std::uint8_t>(x - 256 * high_digit);
      std::memcpy(whole + 2 * i, &x16, sizeof x16);
      if (i % kVector == 0) sums.push_back(sums.back());
      sums.back() += x;
    }
    digits = {reinterpret_cast<const std::int8_t*>(high), reinterpret_cast<const std::int8_t*>(low),
              reinterpret_cast<const std::int16_t*>(whole), sums.data()};
  }
  Vector(const Vector&) = delete;
};

void test_dot(Random& random) {
  Case buffers(random);
  const std::size_t count = random_count(random, kVector);
  std::uint8_t* weights = buffers.noise(count);
  const std::size_t kind = random.below(4);
  for (std::size_t i = 0; i < count; ++i) {
    if (kind == 1) weights[i] = 255;
    if (kind == 2) weights[i] = (weights[i] & 1) != 0 ? 0 : 255;
    if (kind == 3) weights[i] &= 15;
  }
  std::vector<std::unique_ptr<Vector>> vectors;
  Digits x[kColumnTile];
  std::int64_t exact[kColumnTile] = {};
  for (std::size_t column = 0; column < kColumnTile; ++column) {
    vectors.push_back(std::make_unique<Vector>(random, buffers, count));
    x[column] = vectors.back()->digits;
    for (std::size_t i = 0; i < count; ++i) exact[column] += weights[i] * x[column].whole[i];
  }
  for (const Kernels* isa : kKernels) {
    std::int64_t tile[kColumnTile];
    isa->dot_tile(weights, x, count, tile);
    require(isa->dot(weights, x[0], count) == exact[0] && std::equal(tile, tile + 4, exact),
            std::string("products: ") + isa->name + " is exact");
  }
  // Several rows, each right behind the one before.
  for (const Kernels* isa : kKernels) {
    if (isa->dot_tile_rows == nullptr) continue;
    const std::size_t width = std::min(count / isa->dot_rows / kVector * kVector, kDotRowsColumns);
    if (width == 0) continue;
    std::vector<std::int64_t> rows(isa->dot_rows * kColumnTile), found(rows);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::uint8_t* row = weights + i / kColumnTile * width;
      for (std::size_t j = 0; j < width; ++j) rows[i] += row[j] * x[i % kColumnTile].whole[j];
    }
    isa->dot_tile_rows(weights, width, x, width, found.data());
    require(found == rows, std::string("products of several rows: ") + isa->name + " is exact");
  }
}

}  // namespace

int main() {
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    Random random(seed);
    test_field(random, false);
    test_field(random, true);
    test_split(random);
    test_low_bits(random);
    test_count(random);
    test_dot(random);
  }
  for (const Kernels* isa : kKernels) std::printf("kernels: %s agrees\n", isa->name);
}
