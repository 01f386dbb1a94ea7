// The kernels of AVX-512 and, in a second table, those with the products of AMX.
#include <utility>

#include "kernels/generic/instantiations.hpp"
#include "kernels/generic/sparse_kernels_of.hpp"
#include "kernels/kernels.hpp"
#include "kernels/x86/amx_parts.hpp"
#include "kernels/x86/avx512_parts.hpp"
#include "kernels/x86/avx512_root.hpp"
#include "kernels/x86/avx512_sums.hpp"

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

std::size_t dense_field(const FieldArgs& args, std::uint8_t* out) {
  return decode_fields(
      args, []<int Bits, bool Escape>() { return &dense_field_of<Bits, Escape>; }, out);
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
  instantiation<1, kMaxLowBits>(bits, []<int Bits>() { return &or_low_bits_of<Bits>; })(fields,
                                                                                        count, out);
}

std::int64_t dot(const std::uint8_t* weights, const Digits& x, std::size_t count) {
  DigitSums sums;
  for_vectors(count / kVector, [&]<int Step>(std::size_t eight) {
    const std::size_t at = (eight * 8 + Step) * kVector;
    sums.add<Step % 4>(load(weights + at), x.high + at, x.low + at);
  });
  return sums.total<1, 0>();
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
  if constexpr (sizeof...(I) == 8) {
    store(reinterpret_cast<std::uint8_t*>(out), reduce_eight(high, low));
  } else {
    ((out[I] = reduce_digits(high[I], low[I])), ...);
  }
}

void dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  dot_tile_of<1>(weights, 0, x, count, out, std::make_index_sequence<kColumnTile>());
}

void dot_tile_pair(const std::uint8_t* weights, std::size_t stride, const Digits* x,
                   std::size_t count, std::int64_t* out) {
  dot_tile_of<2>(weights, stride, x, count, out, std::make_index_sequence<2 * kColumnTile>());
}

constexpr Kernels kTable = {.name = "avx512",
                            .sparse_field = sparse_field<Avx512Vectors>,
                            .dense_field = dense_field,
                            .split = split<Avx512Vectors>,
                            .or_low_bits = or_low_bits,
                            .count_all_ones = count_all_ones,
                            .dot = dot,
                            .dot_tile = dot_tile,
                            .dot_tile_rows = dot_tile_pair,
                            .cascade_product = cascade_product,
                            .encode = &kAvx512EncodeKernels,
                            .flat = &kAvx512FlatKernels,
                            .grouped = &kAvx512GroupedKernels,
                            .lossless = &kAvx512LosslessKernels,
                            .floats = &kAvx512FloatKernels};

}  // namespace

constinit const Kernels kAvx512Kernels = kTable;

#ifdef ENTROLLM_HAVE_AMX
constinit const Kernels kAmxKernels = [] {
  Kernels kernels = kTable;
  kernels.name = "amx";
  kernels.cascade_panels = cascade_panels;
  kernels.panel_product = panel_product;
  kernels.cascade_digit_groups = cascade_digit_groups;
  return kernels;
}();
#endif

}  // namespace entrollm
