// Coded matrices over exact-size buffers: products, rows and damaged streams.
#include <cmath>

#include "coded_case.hpp"
#include "product/grouped.hpp"
#include "product/matrix.hpp"
#include "product/product.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

void check_products(const CodedCase& c, const CodedMatrix& matrix, ThreadPool& pool) {
  std::vector<float> y(c.batch * c.geometry.rows);
  const AnyMatrix matrices[] = {&matrix};
  multiply(pool, matrices, c.x.data(), c.batch, y.data());
  for (std::size_t b = 0; b < c.batch; ++b) {
    double largest = 0;
    for (std::size_t j = 0; j < c.geometry.columns; ++j) {
      largest = std::max(largest, std::fabs(double{c.x[b * c.geometry.columns + j]}));
    }
    for (std::size_t i = 0; i < c.geometry.rows; ++i) {
      double sum = 0;
      double bound = 1e-30;
      for (std::size_t j = 0; j < c.geometry.columns; ++j) {
        const double weight = 0.5 * c.symbols[i * c.geometry.columns + j] - 3.0;
        sum += weight * c.x[b * c.geometry.columns + j];
        bound += std::fabs(weight) * largest / 65000;
      }
      bound += std::fabs(sum) * 1e-6;
      require(std::fabs(y[b * c.geometry.rows + i] - sum) <= bound, "the product is close");
    }
  }
}

GroupScales scales_of(std::size_t size, std::size_t groups, const std::vector<float>& scale,
                      const std::vector<float>& minimum, const std::vector<float>& values) {
  GroupScales scales{size, {}, values};
  scales.terms.groups = groups;
  scales.terms.scale.values = scale.data();
  if (!minimum.empty()) scales.terms.minimum.values = minimum.data();
  return scales;
}

// Group scales at the edges of exact-size arrays. Returns whether the flat form numbers symbols.
bool check_groups(const CodedCase& c, const CodedMatrix& matrix, ThreadPool& pool, Random& random) {
  const Geometry& geometry = c.geometry;
  constexpr std::size_t kSizes[] = {8, 12, 16, 32, 64, 128, 192, 512, 1024};
  const std::size_t size = random.coin()   ? kSizes[random.below(std::size(kSizes))]
                           : random.coin() ? 1 + random.below(200)
                                           : 1 + random.below(2 * geometry.columns);
  const std::size_t groups = (geometry.columns - 1) / size + 1;
  std::vector<float> scale(geometry.rows * groups), shift(random.coin() ? scale.size() : 0);
  for (auto& value : scale) value = static_cast<float>(random.byte()) / 64 - 1;
  for (auto& value : shift) value = static_cast<float>(random.byte()) / 64 - 3;
  std::vector<float> values(random.coin() ? 256 : 0);
  for (auto& value : values) value = static_cast<float>(random.byte()) / 16 - 9;
  std::vector<float> y(c.batch * geometry.rows);
  GroupedMatrix grouped(matrix, scales_of(size, groups, scale, shift, values));
  const GroupedMatrix* const matrices[] = {&grouped};
  multiply_grouped(pool, matrices, c.x.data(), c.batch, y.data());
  for (std::size_t b = 0; b < c.batch; ++b) {
    const float* x = c.x.data() + b * geometry.columns;
    double largest = 0;
    for (std::size_t j = 0; j < geometry.columns; ++j) {
      largest = std::max(largest, std::fabs(double{x[j]}));
    }
    for (std::size_t i = 0; i < geometry.rows; ++i) {
      double sum = 0;
      double bound = 1e-30;
      for (std::size_t j = 0; j < geometry.columns; ++j) {
        const std::size_t group = i * groups + j / size;
        const std::uint8_t symbol = c.symbols[i * geometry.columns + j];
        const double value =
            values.empty() ? static_cast<double>(symbol) : static_cast<double>(values[symbol]);
        const double weight =
            value * scale[group] - (shift.empty() ? 0.0 : static_cast<double>(shift[group]));
        sum += weight * x[j];
        bound += std::fabs(weight) * largest / 65000;
      }
      bound += std::fabs(sum) * 1e-6;
      require(std::fabs(y[b * geometry.rows + i] - sum) <= bound, "the grouped product is close");
    }
  }
  const std::vector<float> before = y;
  grouped.flatten(pool);
  require(grouped.is_flat() == grouped.can_flatten(), "it is flat if it can be");
  multiply_grouped(pool, matrices, c.x.data(), c.batch, y.data());
  require(before == y, "the flat form has the same products");
  try {
    GroupedMatrix(matrix, scales_of(size, groups + 1, scale, shift, values));
    require(false, "another number of groups is refused");
  } catch (const std::invalid_argument&) {
  }
  return grouped.table() != nullptr;
}

void check_rows(const CodedCase& c, const CodedMatrix& matrix, ThreadPool& pool, Random& random) {
  const std::size_t begin = random.below(c.geometry.rows + 1);
  const std::size_t end = begin + random.below(c.geometry.rows - begin + 1);
  const std::size_t size = (end - begin) * c.geometry.columns;
  const std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[size]);
  matrix.decode(pool, begin, end, out.get());
  require(
      size == 0 || std::memcmp(out.get(), c.symbols.data() + begin * c.geometry.columns, size) == 0,
      "rows decode");
  const std::vector<std::int64_t> picked{static_cast<std::int64_t>(random.below(c.geometry.rows)),
                                         0};
  const std::unique_ptr<float[]> values(new float[2 * c.geometry.columns]);
  matrix.dequantize(pool, picked, values.get());
  for (std::size_t j = 0; j < c.geometry.columns; ++j) {
    const auto row = static_cast<std::size_t>(picked[0]);
    const float expected = static_cast<float>(c.symbols[row * c.geometry.columns + j]) * 0.5f;
    require(values[j] == expected - 3.0f, "rows dequantize");
  }
}

// Returns whether a damaged stream was refused.
bool survives(const CodedCase& c, Random& random, ThreadPool& pool) {
  EncodedRows rows = c.rows;
  Bytes& stream = rows.sparse.empty() || random.coin() ? rows.dense : rows.sparse;
  if (!stream.empty())
    stream[random.below(stream.size())] ^= static_cast<std::uint8_t>(1 + random.below(255));
  auto& sizes = rows.sparse_sizes;
  if (sizes.size() > 1 && random.coin()) std::swap(sizes[0], sizes[random.below(sizes.size())]);
  const ExactBuffer dense = pad(rows.dense);
  const ExactBuffer sparse = pad(rows.sparse);
  std::vector<float> y(c.batch * c.geometry.rows);
  Bytes out(c.symbols.size());
  try {
    const CodedMatrix matrix(c.code, c.geometry, dense.span(), sparse.span(), sizes,
                             {c.scale, c.offset, {}});
    const AnyMatrix matrices[] = {&matrix};
    multiply(pool, matrices, c.x.data(), c.batch, y.data());
    matrix.decode(pool, 0, c.geometry.rows, out.data());
    return false;
  } catch (const CorruptBlock&) {
    return true;
  }
}

bool refuses(const CodedCase& c, std::size_t dense_size, std::size_t sparse_size,
             std::size_t sizes) {
  const Bytes dense(dense_size), sparse(sparse_size);
  const std::vector<std::uint16_t> none(sizes, 0xffff);
  try {
    CodedMatrix(c.code, c.geometry, dense, sparse, none, {c.scale, {}, {}});
    return false;
  } catch (const std::invalid_argument&) {
    return true;
  }
}

}  // namespace

int main() {
  ThreadPool one(1);
  ThreadPool three(3);
  std::size_t refused = 0, numbered = 0;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Random random(seed);
    const RandomCode source(random);
    const CodedCase c(random, source);
    const ExactBuffer dense = pad(c.rows.dense);
    const ExactBuffer sparse = pad(c.rows.sparse);
    const CodedMatrix matrix(c.code, c.geometry, dense.span(), sparse.span(), c.rows.sparse_sizes,
                             {c.scale, c.offset, {}});
    ThreadPool& pool = random.coin() ? one : three;
    check_products(c, matrix, pool);
    check_rows(c, matrix, pool, random);
    numbered += check_groups(c, matrix, pool, random);
    for (int n = 0; n < 3; ++n) refused += survives(c, random, pool);
    require(refuses(c, dense.size() + 64, sparse.size(), c.rows.sparse_sizes.size()), "dense size");
    require(refuses(c, dense.size(), sparse.size() + 64, c.rows.sparse_sizes.size()),
            "sparse size");
    require(refuses(c, dense.size(), sparse.size(), c.rows.sparse_sizes.size() + 1), "block count");
  }
  std::printf("matrix: %zu of 900 damaged matrices refused\n", refused);
  require(numbered > 0 && numbered < 100, "some matrices have few symbols");
  require(refused > 100, "damage is noticed where lengths disagree");
}
