// The kernels of group scales of every instruction set: the bits that kernels/grouped_kernels.hpp
// defines, from integers of 64 bits, in buffers of exactly the size that the interface allows.
#include <algorithm>
#include <cmath>
#include <limits>

#include "guarded.hpp"
#include "kernels/grouped_kernels.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

const std::vector<const Kernels*> kKernels = all_kernels();

// Values between two inaccessible pages.
class Buffers {
 public:
  explicit Buffers(Random& random) : at_end_(random.coin()) {}

  template <class T>
  T* copy(const std::vector<T>& values) {
    T* data = room<T>(values.size());
    std::copy(values.begin(), values.end(), data);
    return data;
  }
  template <class T>
  T* room(std::size_t count) {
    buffers_.push_back(std::make_unique<Guarded>(count * sizeof(T), at_end_));
    return reinterpret_cast<T*>(buffers_.back()->data());
  }

 private:
  bool at_end_;
  std::vector<std::unique_ptr<Guarded>> buffers_;
};

std::vector<float> floats(Random& random, std::size_t count) {
  std::vector<float> values(count);
  for (auto& value : values) {
    value = (static_cast<float>(random.below(65536)) - 32768.0f) / 4099.0f;
  }
  return values;
}

bool same_bits(const float* a, const float* b, std::size_t count) {
  return std::memcmp(a, b, count * sizeof *a) == 0;
}

struct ProductCase {
  std::size_t steps, group_steps, count, groups;
  int bits;
  Bytes table;                      // empty if fields are symbols
  Bytes fields;                     // (steps, kVector)
  std::vector<std::int16_t> whole;  // (steps, kStepColumns, count)
  std::vector<float> scales, shifts, sums;

  explicit ProductCase(Random& random) {
    constexpr std::size_t kGroups[] = {1, 2, 4, 8, 12, 16, 24, 32, 63, 64, 65, 128};
    steps = 1 + random.below(random.coin() ? 20 : 300);
    group_steps = random.coin()   ? kGroups[random.below(std::size(kGroups))]
                  : random.coin() ? 1 + random.below(2 * steps)
                                  : std::numeric_limits<std::size_t>::max() / kStepColumns;
    count = std::size_t{1} << random.below(4);
    groups = (steps - 1) / group_steps + 1;
    bits = static_cast<int>(2 + random.below(7));
    if ((bits == 3 || bits == 4) && random.coin()) {
      table.resize(kGroupedTable);
      const std::size_t most = random.coin() ? 255 : 127;
      for (auto& symbol : table) symbol = static_cast<std::uint8_t>(random.below(most + 1));
      table[(1u << bits) - 1] = static_cast<std::uint8_t>(most);
    }
    // All at their ends, or any.
    const bool is_largest = random.below(3) == 0;
    const std::size_t widest = std::size_t{1} << bits;
    fields.resize(steps * kVector);
    for (auto& field : fields) {
      field = static_cast<std::uint8_t>(is_largest ? widest - 1 : random.below(widest));
    }
    const int sign = random.coin() ? 1 : -1;
    whole.resize(steps * kStepColumns * count);
    for (auto& x : whole) {
      x = static_cast<std::int16_t>(is_largest ? sign * 32639
                                               : static_cast<int>(random.below(65279)) - 32639);
    }
    scales = floats(random, groups * kGroupedRows);
    if (random.coin()) shifts = floats(random, groups * kGroupedRows);
    sums = floats(random, count * groups);
  }

  int symbol(std::size_t step, std::size_t place) const {
    const std::uint8_t field = fields[step * kVector + place];
    return table.empty() ? field : table[field];
  }
  std::int16_t activation(std::size_t step, std::size_t column, std::size_t vector) const {
    return whole[(step * kStepColumns + column) * count + vector];
  }
  int symbol_bits() const {
    if (table.empty()) return bits;
    return *std::max_element(table.begin(), table.end()) > 127 ? 8 : 7;
  }

  std::vector<float> totals() const {
    std::vector<float> totals;
    for (std::size_t vector = 0; vector < count; ++vector) {
      for (std::size_t row = 0; row < kGroupedRows; ++row) totals.push_back(total(vector, row));
    }
    return totals;
  }

  // The digits of all vectors as a set of kernels takes them.
  std::vector<std::int8_t> digits(bool takes_whole) const {
    std::vector<std::int8_t> out(steps * count * kStepBytes);
    constexpr std::size_t kOrder[] = {0, 2, 1, 3};
    for (std::size_t i = 0; i < steps * count; ++i) {
      std::int8_t* at = out.data() + i * kStepBytes;
      for (std::size_t c = 0; c < kStepColumns; ++c) {
        const std::int16_t x = activation(i / count, takes_whole ? kOrder[c] : c, i % count);
        const int high = (x + 128) >> 8;
        if (takes_whole) {
          std::memcpy(at + 2 * c, &x, sizeof x);
        } else {
          at[c] = static_cast<std::int8_t>(high);
          at[kStepColumns + c] = static_cast<std::int8_t>(x - 256 * high);
        }
      }
    }
    return out;
  }

 private:
  float total(std::size_t vector, std::size_t row) const {
    float total = 0.0f;
    for (std::size_t group = 0, at = 0; group < groups; ++group) {
      const std::size_t end = at + std::min(group_steps, steps - at);
      const std::size_t term = group * kGroupedRows + row;
      if (!shifts.empty()) total = std::fma(shifts[term], sums[vector * groups + group], total);
      while (at < end) {
        const std::size_t stop = std::min(end, at + kGroupedRun);
        std::int64_t sum = 0;
        for (; at < stop; ++at) {
          for (std::size_t c = 0; c < kStepColumns; ++c) {
            sum += std::int64_t{symbol(at, row * kStepColumns + c)} * activation(at, c, vector);
          }
        }
        total = std::fma(static_cast<float>(sum), scales[term], total);
      }
    }
    return total;
  }
};

void test_product(Random& random) {
  Buffers buffers(random);
  const ProductCase c(random);
  const std::vector<float> expected = c.totals();
  Bytes packed(c.steps * flat_chunk_bytes(c.bits));
  kScalarFlatKernels.pack(c.fields.data(), c.steps, c.bits, 0, packed.data());
  const GroupedTile tile{buffers.copy(packed),
                         c.steps,
                         c.bits,
                         c.table.empty() ? nullptr : buffers.copy(c.table),
                         c.symbol_bits(),
                         c.group_steps,
                         buffers.copy(c.scales),
                         c.shifts.empty() ? nullptr : buffers.copy(c.shifts)};
  for (const Kernels* isa : kKernels) {
    const GroupedKernels& grouped = *isa->grouped;
    const GroupedVectors x{buffers.copy(c.digits(grouped.takes_whole)), c.count,
                           buffers.copy(c.sums), c.groups};
    float* totals = buffers.room<float>(expected.size());
    grouped.product(tile, x, totals);
    require(same_bits(totals, expected.data(), expected.size()),
            std::string("a product with group scales: ") + isa->name + " has the defined bits");
  }
}

// Stored numbers of any type, all finite.
Bytes elements(Random& random, Element type, std::size_t count) {
  Bytes bytes(count * element_bytes(type));
  for (auto& byte : bytes) byte = random.byte();
  // The highest bit of the exponent, for numbers whose products are finite, too.
  const std::size_t size = element_bytes(type);
  for (std::size_t i = size - 1; size > 1 && i < bytes.size(); i += size) bytes[i] &= 0xbf;
  return bytes;
}

GroupArray array_of(Random& random, Buffers& buffers, std::size_t rows, std::size_t groups) {
  GroupArray array;
  array.type = static_cast<Element>(random.below(5));
  array.values = buffers.copy(elements(random, array.type, rows * groups));
  if (random.coin()) return array;
  constexpr std::size_t kRatios[] = {1, 2, 3, 8, 16, 1000};
  array.ratio = kRatios[random.below(std::size(kRatios))];
  array.super_type = static_cast<Element>(random.below(3));
  const std::size_t supers = (groups - 1) / array.ratio + 1;
  array.supers = buffers.copy(elements(random, array.super_type, rows * supers));
  return array;
}

void test_terms(Random& random) {
  Buffers buffers(random);
  const std::size_t groups = random.coin() ? 1 + random.below(40) : 16 * (1 + random.below(12));
  const std::size_t first = random.below(20), rows = 1 + random.below(kGroupedRows);
  GroupTerms terms{groups, array_of(random, buffers, first + rows, groups), {}, {}};
  if (random.coin()) terms.zero = array_of(random, buffers, first + rows, groups);
  if (random.coin()) terms.minimum = array_of(random, buffers, first + rows, groups);
  if (random.coin()) terms.zero_of_all = 8.0f;
  if (random.coin()) terms.factor = 0.37f;
  const std::size_t count = rows * groups;
  std::vector<float> scale, shift;
  for (const Kernels* isa : kKernels) {
    float* found[] = {buffers.room<float>(count), buffers.room<float>(count)};
    isa->grouped->terms(terms, first, rows, found[0], found[1], buffers.room<float>(count));
    if (scale.empty()) {
      scale.assign(found[0], found[0] + count);
      shift.assign(found[1], found[1] + count);
    }
    require(same_bits(found[0], scale.data(), count) && same_bits(found[1], shift.data(), count),
            std::string("terms of groups: ") + isa->name + " agrees with scalar");
  }
}

void test_transpose(Random& random) {
  Buffers buffers(random);
  const std::size_t groups = 1 + random.below(40), count = groups * kGroupedRows;
  const std::vector<float> rows = floats(random, count);
  for (const Kernels* isa : kKernels) {
    float* out = buffers.room<float>(count);
    isa->grouped->transpose(buffers.copy(rows), groups, out);
    for (std::size_t i = 0; i < count; ++i) {
      require(out[i] == rows[i % kGroupedRows * groups + i / kGroupedRows],
              std::string("terms by groups: ") + isa->name + " moves each to its place");
    }
  }
}

}  // namespace

int main() {
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    Random random(seed);
    test_product(random);
    test_terms(random);
    test_transpose(random);
  }
  for (const Kernels* isa : kKernels) std::printf("group scales: %s agrees\n", isa->name);
}
