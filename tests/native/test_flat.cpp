// The flat layout: every instruction set packs and unpacks as the definition says.
#include <algorithm>

#include "format/flat.hpp"
#include "guarded.hpp"
#include "product/activations.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// Fields in the order of the layout's definition: byte and bit of each column.
void check_definition() {
  for (int bits = kMinFlatBits; bits <= kMaxFlatBits; ++bits) {
    for (std::size_t column = 0; column < kVector; ++column) {
      for (int bit = 0; bit < bits; ++bit) {
        Bytes chunk(flat_chunk_bytes(bits));
        set_flat_field(chunk.data(), bits, column, static_cast<std::uint8_t>(1 << bit));
        std::size_t ones = 0;
        for (const std::uint8_t byte : chunk) {
          ones += static_cast<std::size_t>(__builtin_popcount(byte));
        }
        require(ones == 1, "a bit of a field is one bit of its chunk");
        for (std::size_t other = 0; other < kVector; ++other) {
          require(flat_field(chunk.data(), bits, other) == (other == column ? 1 << bit : 0),
                  "it belongs to one column");
        }
      }
    }
  }
  Bytes chunk(flat_chunk_bytes(7));
  set_flat_field(chunk.data(), 7, 33, 0x5a);  // 0b101'1010: nibble 10, pair 1, bit 1
  require(chunk[1] == 0xa0 && chunk[32 + 1] == 1 << 4 && chunk[48 + 1] == 1 << 4,
          "the parts of width 7 lie where the format says");
}

void check_packing(const Kernels& kernels, Random& random) {
  const std::string name = kernels.name;
  for (int bits = kMinFlatBits; bits <= kMaxFlatBits; ++bits) {
    for (std::size_t chunks = 1; chunks < 6; ++chunks) {
      const auto base = static_cast<std::uint8_t>(random.below(257 - (std::size_t{1} << bits)));
      Guarded symbols(chunks * kVector, random.coin());
      for (std::size_t i = 0; i < symbols.size(); ++i) symbols.data()[i] = random.byte();
      Guarded fields(flat_row_bytes(chunks, bits), random.coin());
      Bytes expected(fields.size()), clipped(symbols.size());
      kScalarFlatKernels.pack(symbols.data(), chunks, bits, base, expected.data());
      kernels.flat->pack(symbols.data(), chunks, bits, base, fields.data());
      require(std::memcmp(fields.data(), expected.data(), fields.size()) == 0, name + " packs");
      kScalarFlatKernels.unpack(expected.data(), chunks, bits, base, clipped.data());
      const int largest = base + (1 << bits) - 1;
      for (std::size_t i = 0; i < clipped.size(); ++i) {
        require(clipped[i] == std::clamp<int>(symbols.data()[i], base, largest), "symbols clip");
      }
      Guarded unpacked(symbols.size(), random.coin());
      kernels.flat->unpack(fields.data(), chunks, bits, base, unpacked.data());
      require(std::memcmp(unpacked.data(), clipped.data(), clipped.size()) == 0, name + " unpacks");
    }
  }
}

// Fields, and activations with their digits, of one kind each: random, or the extremes.
struct ProductCase {
  FlatRows rows;
  std::size_t count;
  Guarded fields;
  AlignedArray<std::int8_t> digits;
  std::vector<std::int16_t> whole;  // (columns, count)

  ProductCase(Random& random, int bits, std::size_t row_count, std::size_t chunks,
              std::size_t vectors)
      : rows{nullptr, row_count, chunks, bits},
        count(vectors),
        fields(row_count * flat_row_bytes(chunks, bits), random.coin()),
        digits(2 * chunks * kVector * vectors),
        whole(chunks * kVector * vectors) {
    rows.fields = fields.data();
    const bool is_full = random.coin();
    for (std::size_t i = 0; i < fields.size(); ++i)
      fields.data()[i] = is_full ? 0xff : random.byte();
    const std::size_t kind = random.below(3);
    for (std::size_t column = 0; column < chunks * kVector; ++column) {
      for (std::size_t vector = 0; vector < vectors; ++vector) {
        const auto high = static_cast<std::int8_t>(kind == 0   ? -128
                                                   : kind == 1 ? 127
                                                               : random.byte());
        const auto low = static_cast<std::int8_t>(kind == 0   ? -128
                                                  : kind == 1 ? 127
                                                              : random.byte());
        std::int8_t* at = digits.data() + (column / kVector * vectors + vector) * 2 * kVector;
        at[column % kVector] = high;
        at[kVector + column % kVector] = low;
        whole[column * vectors + vector] =
            static_cast<std::int16_t>(kind == 0   ? -32639
                                      : kind == 1 ? 32639
                                                  : static_cast<int>(random.below(65279)) - 32639);
      }
    }
  }
  FlatVectors x() const { return {digits.data(), count}; }
};

void check_product(const Kernels& kernels, const ProductCase& c) {
  const std::size_t stride = c.count + 1;
  std::vector<std::int64_t> sums(c.rows.rows * stride, -1), expected(sums);
  kScalarFlatKernels.product(c.rows, c.x(), expected.data(), stride);
  kernels.flat->product(c.rows, c.x(), sums.data(), stride);
  require(sums == expected, std::string(kernels.name) + " multiplies");
}

void check_products(const Kernels& kernels, Random& random) {
  for (int bits = kMinFlatBits; bits < kMaxFlatBits; ++bits) {
    for (const std::size_t vectors : {1, 2, 4}) {
      check_product(kernels, {random, bits, random.below(10), 1 + random.below(12), vectors});
    }
    // Longer than 32-bit sums are wide.
    if (bits == 7 || bits == 2) check_product(kernels, {random, bits, 5, 2500, 1});
  }
}

void check_patches(const Kernels& kernels, Random& random) {
  for (const std::size_t vectors : {1, 2, 4, 8}) {
    const std::size_t rows = random.below(6), columns = random.coin() ? 64 : 1280;
    const ProductCase c(random, 2, 1, columns / kVector, vectors);
    std::vector<std::uint32_t> first{0};
    std::vector<FlatPatch> words;
    std::vector<std::int64_t> expected(rows * vectors, 7);
    const bool is_full = random.coin(), is_extreme = random.coin();
    for (std::size_t row = 0; row < rows; ++row) {
      std::size_t last = 0;
      for (std::size_t column = 0; column < columns; ++column) {
        if (!is_full && random.below(10) != 0) continue;
        for (std::size_t times = random.below(3); times > 0; --times) {
          const int difference = is_extreme ? kLeastPatch : static_cast<int>(random.below(16)) - 8;
          words.push_back(make_patch(column - last, difference));
          last = column;
          for (std::size_t i = 0; i < vectors; ++i) {
            expected[row * vectors + i] += std::int64_t{difference} * c.whole[column * vectors + i];
          }
        }
      }
      first.push_back(static_cast<std::uint32_t>(words.size()));
    }
    const FlatPatches patches{first.data(), words.data()};
    std::vector<std::int64_t> sums(expected.size(), 7);
    kernels.flat->add_patches(patches, rows, c.whole.data(), vectors, sums.data());
    require(sums == expected, std::string(kernels.name) + " adds patches");
  }
}

}  // namespace

int main() {
  check_definition();
  Random random(1);
  for (const Kernels* kernels : all_kernels()) {
    for (int n = 0; n < 20; ++n) {
      check_packing(*kernels, random);
      check_products(*kernels, random);
      check_patches(*kernels, random);
    }
  }
  std::printf("flat: packed, unpacked and multiplied by %zu instruction sets\n",
              all_kernels().size());
}
