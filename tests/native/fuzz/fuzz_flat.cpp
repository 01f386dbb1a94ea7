// libFuzzer: a flat matrix from arbitrary streams is refused, or decoded and multiplied inside of
// its buffers, and its copy in memory is the same.
#include <stdexcept>

#include "../coded_case.hpp"
#include "product/flat_matrix.hpp"
#include "product/product.hpp"

using namespace entrollm;
using namespace entrollm::test;

namespace {

// The next `count` 16-bit numbers, as many of them as there are.
std::vector<std::uint16_t> take_words(std::span<const std::uint8_t>& data, std::size_t count) {
  std::vector<std::uint16_t> words(std::min(count, data.size() / 2));
  if (!words.empty()) std::memcpy(words.data(), data.data(), 2 * words.size());
  data = data.subspan(2 * words.size());
  return words;
}

}  // namespace

// Input: rows and whether they have a trellis, columns (2 bytes), rows of a segment, windows,
// sizes, patches; then fields, which are cut or filled with zeros to the size that the windows call
// for.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  if (size < 4) return 0;
  std::span<const std::uint8_t> data(bytes + 4, size - 4);
  const std::size_t rows = 1 + bytes[0] % 8, segment_rows = 1 + bytes[3] % 4;
  const std::size_t columns = 1 + (bytes[1] | static_cast<std::size_t>(bytes[2]) << 8) % 5000;
  const auto windows = take_words(data, (rows - 1) / segment_rows + 1);
  const auto sizes = take_words(data, rows);
  std::size_t patches = 0, fields = 0;
  for (const std::uint16_t row : sizes) patches += row;
  for (std::size_t row = 0; row < rows && row / segment_rows < windows.size(); ++row) {
    const FlatWindow window = FlatWindow::of(windows[row / segment_rows]);
    fields += window.is_valid() ? flat_row_bytes((columns - 1) / kVector + 1, window.bits) : 0;
  }
  Bytes patch_bytes(data.begin(), data.begin() + std::min(patches, data.size()));
  data = data.subspan(patch_bytes.size());
  patch_bytes.resize(patches);
  Bytes field_bytes(data.begin(), data.end());
  field_bytes.resize(fields);
  const ExactBuffer stored_fields = pad(field_bytes), stored_patches = pad(patch_bytes);
  const std::span<const std::uint16_t> row_sizes =
      patches == 0 ? std::span<const std::uint16_t>() : std::span(sizes);
  const FlatStreams streams{segment_rows, stored_fields.span(), stored_patches.span(), row_sizes,
                            windows};
  const std::vector<float> scale{1.0f}, x(2 * columns, 1.0f);
  static ThreadPool pool(1);
  try {
    const FlatMatrix matrix(rows, columns, streams, {scale, {}, {}}, bytes[0] >= 128);
    Bytes symbols(rows * columns);
    matrix.decode(pool, 0, rows, symbols.data());
    std::vector<float> y(2 * rows);
    const AnyMatrix matrices[] = {&matrix};
    multiply(pool, matrices, x.data(), 2, y.data());
    const FlatMatrix copy(pool, matrix);
    Bytes copied(rows * columns);
    copy.decode(pool, 0, rows, copied.data());
    require(copied == symbols, "a copy has the same symbols");
    std::vector<float> again(2 * rows);
    const AnyMatrix copies[] = {&copy};
    multiply(pool, copies, x.data(), 2, again.data());
    require(std::memcmp(again.data(), y.data(), y.size() * sizeof(float)) == 0,
            "a copy has the same products");
  } catch (const std::invalid_argument&) {
  }
  return 0;
}
