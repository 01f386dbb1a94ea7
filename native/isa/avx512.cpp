// AVX-512 kernels (VBMI, VBMI2, VNNI, GFNI): 64 symbols a step, escapes merged with one VPEXPANDB.
#include "isa/avx512_common.hpp"
#include "isa/avx512_parts.hpp"
#include "isa/kernels.hpp"

namespace entrollm {
namespace {

template <int Bits, bool Escape>
std::size_t dense_field_of(const FieldArgs& args, std::uint8_t* out) {
  RootDecoder<Bits, Escape, 0> root(args, nullptr);
  for_vectors(args.count / kVector, [&]<int Step>(std::size_t eight) {
    store(out + (eight * 8 + Step) * kVector, root.template next<Step>(eight));
  });
  return root.escapes;
}

template <bool Escape>
std::size_t dense_field_with(const FieldArgs& args, std::uint8_t* out) {
  switch (args.bits) {
    case 1:
      return dense_field_of<1, Escape>(args, out);
    case 2:
      return dense_field_of<2, Escape>(args, out);
    case 3:
      return dense_field_of<3, Escape>(args, out);
    case 4:
      return dense_field_of<4, Escape>(args, out);
    case 5:
      return dense_field_of<5, Escape>(args, out);
    case 6:
      return dense_field_of<6, Escape>(args, out);
    default:
      return copy_bytes(args, out);
  }
}

std::size_t dense_field(const FieldArgs& args, std::uint8_t* out) {
  return args.child != nullptr ? dense_field_with<true>(args, out)
                               : dense_field_with<false>(args, out);
}

void split(const std::uint8_t* plane, std::size_t count, const std::uint8_t* left,
           const std::uint8_t* right, std::uint8_t* out) {
  for (std::size_t i = 0; i < count; i += kVector) {
    const __mmask64 mask = load_mask(plane + i / 8);
    const __m512i lefts = _mm512_maskz_expand_epi8(~mask, load(left));
    store(out + i, _mm512_mask_expand_epi8(lefts, mask, load(right)));
    const std::size_t taken = popcount(mask);
    right += taken;
    left += kVector - taken;
  }
}

template <int Bits>
void or_low_bits_of(const std::uint8_t* fields, std::size_t count, std::uint8_t* out) {
  const LowReader<Bits> low(fields, count);
  for_vectors(count / kVector, [&]<int Step>(std::size_t eight) {
    std::uint8_t* at = out + (eight * 8 + Step) * kVector;
    store(at, low.template merge<Step>(load(at), eight));
  });
}

void or_low_bits(const std::uint8_t* fields, std::size_t count, int bits, std::uint8_t* out) {
  switch (bits) {
    case 1:
      return or_low_bits_of<1>(fields, count, out);
    case 2:
      return or_low_bits_of<2>(fields, count, out);
    case 3:
      return or_low_bits_of<3>(fields, count, out);
    case 4:
      return or_low_bits_of<4>(fields, count, out);
    case 5:
      return or_low_bits_of<5>(fields, count, out);
    default:
      return or_low_bits_of<6>(fields, count, out);
  }
}

std::int64_t dot(const std::uint8_t* weights, const Digits& x, std::size_t count) {
  DotSums sums;
  for_vectors(count / kVector, [&]<int Step>(std::size_t eight) {
    sums.add<Step>(load(weights + (eight * 8 + Step) * kVector), x, eight);
  });
  return sums.total();
}

// Rows x kColumnTile products at once; 16 accumulators leave room for the operands.
template <std::size_t Rows>
void dot_tile_of(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                 std::size_t count, std::int64_t* out) {
  __m512i high[Rows * kColumnTile];
  __m512i low[Rows * kColumnTile];
  for (std::size_t i = 0; i < Rows * kColumnTile; ++i) high[i] = low[i] = _mm512_setzero_si512();
  for (std::size_t i = 0; i < count; i += kVector) {
    __m512i w[Rows];
    for (std::size_t row = 0; row < Rows; ++row) w[row] = load(weights + row * stride + i);
    for (std::size_t column = 0; column < kColumnTile; ++column) {
      const __m512i x_high = load(x[column].high + i);
      const __m512i x_low = load(x[column].low + i);
      for (std::size_t row = 0; row < Rows; ++row) {
        const std::size_t at = row * kColumnTile + column;
        high[at] = _mm512_dpbusd_epi32(high[at], w[row], x_high);
        low[at] = _mm512_dpbusd_epi32(low[at], w[row], x_low);
      }
    }
  }
  for (std::size_t i = 0; i < Rows * kColumnTile; ++i) out[i] = reduce_digits(high[i], low[i]);
}

void dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  dot_tile_of<1>(weights, 0, x, count, out);
}

void dot_tile_pair(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                   std::size_t count, std::int64_t* out) {
  dot_tile_of<2>(weights, stride, x, count, out);
}

}  // namespace

const Kernels kAvx512Kernels = {
    "avx512", sparse_field_any, dense_field,   split,           or_low_bits,          count_ones,
    dot,      dot_tile,         dot_tile_pair, cascade_product, &kAvx512EncodeKernels};

}  // namespace entrollm
