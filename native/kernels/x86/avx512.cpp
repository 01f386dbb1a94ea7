// AVX-512 kernels (VBMI, VBMI2, VNNI, GFNI): 64 symbols a step, escapes merged with one VPEXPANDB.
#include <utility>

#include "kernels/kernels.hpp"
#include "kernels/x86/avx512_common.hpp"
#include "kernels/x86/avx512_parts.hpp"

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

// Rows x kColumnTile products at once; 16 accumulators leave room for the operands. Indices are
// constants throughout, which keeps the accumulators in registers.
template <std::size_t Rows, std::size_t... I>
void dot_tile_of(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                 std::size_t count, std::int64_t* out, std::index_sequence<I...>) {
  __m512i high[] = {(static_cast<void>(I), _mm512_setzero_si512())...};
  __m512i low[] = {(static_cast<void>(I), _mm512_setzero_si512())...};
  const std::int8_t* x_high[] = {x[0].high, x[1].high, x[2].high, x[3].high};
  const std::int8_t* x_low[] = {x[0].low, x[1].low, x[2].low, x[3].low};
  for (std::size_t i = 0; i < count; i += kVector) {
    const __m512i w[2] = {load(weights + i), load(weights + (Rows - 1) * stride + i)};
    __m512i digits[] = {load(x_high[0] + i), load(x_high[1] + i), load(x_high[2] + i),
                        load(x_high[3] + i), load(x_low[0] + i),  load(x_low[1] + i),
                        load(x_low[2] + i),  load(x_low[3] + i)};
    (keep_in_register(digits[I % 8]), ...);  // one load serves all rows
    (add_products(high[I], w[I / kColumnTile], digits[I % kColumnTile]), ...);
    (add_products(low[I], w[I / kColumnTile], digits[kColumnTile + I % kColumnTile]), ...);
  }
  ((out[I] = reduce_digits(high[I], low[I])), ...);
}

void dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  dot_tile_of<1>(weights, 0, x, count, out, std::make_index_sequence<kColumnTile>());
}

void dot_tile_pair(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                   std::size_t count, std::int64_t* out) {
  dot_tile_of<2>(weights, stride, x, count, out, std::make_index_sequence<2 * kColumnTile>());
}

}  // namespace

const Kernels kAvx512Kernels = {.name = "avx512",
                                .sparse_field = sparse_field_any,
                                .dense_field = dense_field,
                                .split = split,
                                .or_low_bits = or_low_bits,
                                .count_all_ones = count_ones,
                                .dot = dot,
                                .dot_tile = dot_tile,
                                .dot_tile_pair = dot_tile_pair,
                                .cascade_product = cascade_product,
                                .encode = &kAvx512EncodeKernels,
                                .flat = &kAvx512FlatKernels,
                                .floats = &kAvx512FloatKernels};

}  // namespace entrollm
