// libFuzzer: a small matrix whose streams were changed or are arbitrary, perhaps with a trellis.
// The coded product, the flat one and those of scale groups must refuse it alike, or compute the
// same bits.
#include "input.hpp"
#include "product/grouped.hpp"
#include "product/product.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// Activations, (batch, columns), and the columns that share a scale.
struct Case {
  const std::vector<float>& x;
  std::size_t batch;
  std::size_t group;
};

void check_flat(ThreadPool& pool, const CodedMatrix& matrix, const Case& c) {
  const std::size_t outputs = c.batch * matrix.geometry().rows;
  const AnyMatrix coded = &matrix;
  const Product before =
      product(outputs, [&](float* y) { multiply(pool, {&coded, 1}, c.x.data(), c.batch, y); });
  const Product after = product(outputs, [&](float* y) {
    const FlatMatrix transcoded(pool, matrix);
    const AnyMatrix flat = &transcoded;
    multiply(pool, {&flat, 1}, c.x.data(), c.batch, y);
  });
  require_equal(before, after, "the flat product");
}

void check_groups(ThreadPool& pool, const CodedMatrix& matrix, const Case& c, Random& random) {
  const Geometry& geometry = matrix.geometry();
  const std::size_t groups = (geometry.columns + c.group - 1) / c.group;
  std::vector<float> scales(geometry.rows * groups);
  for (auto& value : scales) value = static_cast<float>(random.byte()) / 64.0f;
  GroupTerms terms{groups, {scales.data()}, {}, {}};
  terms.zero_of_all = static_cast<float>(random.below(9));
  GroupedMatrix grouped(matrix, {c.group, terms, {}});
  const auto multiply_groups = [&](float* y) {
    const GroupedMatrix* each = &grouped;
    multiply_grouped(pool, {&each, 1}, c.x.data(), c.batch, y);
  };
  const std::size_t outputs = c.batch * geometry.rows;
  const Product before = product(outputs, multiply_groups);
  const Product after = product(outputs, [&](float* y) {
    if (grouped.can_flatten()) grouped.flatten(pool);
    multiply_groups(y);
  });
  require_equal(before, after, "the product of scale groups");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static ThreadPool pool(1);
  Input input(data, size);
  Random random(input.word());
  const RandomCode source(random);
  const Code code = source.code();
  const Geometry geometry = small_geometry(input);
  const std::size_t batch = 1 + input.byte() % 3;
  constexpr std::size_t kSizes[] = {8, 16, 32, 64, 128, 24};
  const std::size_t kind = input.byte() % 3;
  const bool has_groups = kind == 1, has_trellis = kind == 2;
  const std::size_t group = kSizes[input.byte() % std::size(kSizes)];
  const EncodedRows rows = streams(input, source, code, geometry, random);

  const ExactBuffer dense = pad(rows.dense);
  const ExactBuffer sparse = pad(rows.sparse);
  const float scale = 0.5f;
  const float offset = -3.0f;
  const CodedMatrix matrix(code, geometry, dense.span(), sparse.span(), rows.sparse_sizes,
                           {{&scale, 1}, {&offset, 1}, {}}, has_trellis);
  std::vector<float> x(batch * geometry.columns);
  for (auto& value : x) value = static_cast<float>(random.byte()) - 100.0f;

  if (has_groups) {
    check_groups(pool, matrix, {x, batch, group}, random);
  } else {
    check_flat(pool, matrix, {x, batch, group});
  }
  return 0;
}
