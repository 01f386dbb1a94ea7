// NEON kernels for ARMv8.0 (Cortex-A57, A72) and, in a second table, with the dot product of
// ARMv8.2 (Cortex-A76): 64 symbols a step as four quarters of 16, escapes merged by TBX with
// indices from a table of 256 bit patterns.
#include <arm_neon.h>

#include "kernels/generic/vector_steps.hpp"
#include "kernels/kernels.hpp"

namespace entrollm {
namespace {

constexpr std::size_t kQuarter = 16;

std::uint64_t load_bits(const std::uint8_t* p) {
  std::uint64_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return word;
}

std::uint64_t below(std::size_t count) {
  return count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

// Byte k is the number of ones in bytes 0 to k of `bits`; at most 64.
std::uint64_t counts_up_to(uint8x8_t bits) {
  return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(bits)), 0) * 0x0101010101010101u;
}

// Indices for TBX that put the next bytes of a list where a bit is set, and are out of its range
// elsewhere. The indices of 16 symbols are the sum of an entry for each of their two bytes.
struct ExpandTable {
  std::uint8_t first[256][16];   // indices of bits 0-7, then the number of ones, eight times
  std::uint8_t second[256][16];  // zeros, then the indices of bits 8-15 without those ones
};

constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (unsigned bits = 0; bits < 256; ++bits) {
    std::uint8_t ones = 0;
    for (unsigned i = 0; i < 8; ++i) {
      const bool set = (bits >> i & 1) != 0;
      table.first[bits][i] = table.second[bits][8 + i] = set ? ones : 0x80;
      if (set) ++ones;
    }
    for (unsigned i = 8; i < 16; ++i) table.first[bits][i] = ones;
  }
  return table;
}

alignas(64) constexpr ExpandTable kExpand = make_expand_table();

// The escapes of a vector: their bits, and where the next bytes of their list go.
class Merge {
 public:
  explicit Merge(uint8x8_t bits)
      : Merge(vget_lane_u64(vreinterpret_u64_u8(bits), 0), counts_up_to(bits)) {}

  std::uint64_t bits() const { return bits_; }
  std::size_t count() const { return counts_ >> 56; }
  // How many escapes come before a quarter.
  std::size_t before(int quarter) const {
    return quarter == 0 ? 0 : counts_ >> (quarter * 16 - 8) & 0xff;
  }
  // Replaces the symbols of a quarter whose bit is set by the next ones of `child`.
  uint8x16_t into(uint8x16_t symbols, int quarter, const std::uint8_t* child) const {
    return vqtbx1q_u8(symbols, vld1q_u8(child + before(quarter)), indices(quarter));
  }
  // The same with zero for the other symbols.
  uint8x16_t only(int quarter, const std::uint8_t* child) const {
    return vqtbl1q_u8(vld1q_u8(child + before(quarter)), indices(quarter));
  }
  // The symbols that this one leaves out.
  Merge complement() const { return Merge(~bits_, 0x4038302820181008 - counts_); }

 private:
  Merge(std::uint64_t bits, std::uint64_t counts) : bits_(bits), counts_(counts) {}

  // Kept in a register, so that one AND shifts and masks.
  static std::uint64_t entry_mask() {
    std::uint64_t mask = 0xff0;
    asm("" : "+r"(mask));
    return mask;
  }

  uint8x16_t indices(int quarter) const {
    return vaddq_u8(vld1q_u8(kExpand.first[0] + entry(2 * quarter)),
                    vld1q_u8(kExpand.second[0] + entry(2 * quarter + 1)));
  }
  std::size_t entry(int byte) const {
    return (byte == 0 ? bits_ << 4 : bits_ >> (8 * byte - 4)) & entry_mask_;
  }

  std::uint64_t bits_;
  std::uint64_t counts_;
  std::uint64_t entry_mask_ = entry_mask();
};

// Stores a vector in one go: were its stores spread between loads, they could not be paired.
void store(std::uint8_t* out, const uint8x16_t (&quarters)[4]) {
  for (std::size_t i = 0; i < 4; ++i) vst1q_u8(out + i * kQuarter, quarters[i]);
}

// Turns the first eight bytes of bits into four quarters of masks.
class BitSpreader {
 public:
  BitSpreader() {
    for (int quarter = 0; quarter < 4; ++quarter) {
      spread_[quarter] = vcombine_u8(vdup_n_u8(static_cast<std::uint8_t>(2 * quarter)),
                                     vdup_n_u8(static_cast<std::uint8_t>(2 * quarter + 1)));
    }
  }
  uint8x16_t mask(uint8x16_t bits, int quarter) const {
    const uint8x16_t bytes = vqtbl1q_u8(bits, spread_[quarter]);
    return vtstq_u8(bytes, vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)));
  }

 private:
  uint8x16_t spread_[4];
};

// A table of 2^Bits bytes.
template <int Bits>
class Table {
 public:
  explicit Table(const std::uint8_t* entries) {
    for (int i = 0; i < kParts; ++i) parts_.val[i] = vld1q_u8(entries + 16 * i);
  }
  uint8x16_t at(uint8x16_t field) const {
    if constexpr (Bits <= 4) return vqtbl1q_u8(parts_.val[0], field);
    if constexpr (Bits == 5) return vqtbl2q_u8({parts_.val[0], parts_.val[1]}, field);
    return vqtbl4q_u8(parts_, field);
  }

 private:
  static constexpr int kParts = Bits <= 4 ? 1 : 1 << (Bits - 4);
  uint8x16x4_t parts_;
};

template <int Bits, bool Escape>
std::size_t sparse_field_of(const FieldArgs& args, std::uint8_t* out) {
  const std::size_t count = args.count;
  const std::size_t plane_bytes = (count + 7) / 8;
  const std::uint8_t* plane = args.fields;
  const BitSpreader spreader;
  const Table<Bits> table(args.table);
  const uint8x16_t zero = vdupq_n_u8(args.table[0]);
  const uint8x16_t one = vdupq_n_u8(args.table[1]);
  const std::uint8_t* child = args.child;
  std::uint64_t last = 0;
  for (std::size_t i = 0; i < count; i += kVector, plane += 8) {
    uint8x16_t planes[Bits];
    for (int bit = 0; bit < Bits; ++bit) {
      planes[bit] = vld1q_u8(plane + static_cast<std::size_t>(bit) * plane_bytes);
    }
    uint8x16_t symbols[4];
    for (int quarter = 0; quarter < 4; ++quarter) {
      if constexpr (Bits == 1) {
        symbols[quarter] = Escape ? zero : vbslq_u8(spreader.mask(planes[0], quarter), one, zero);
      } else {
        uint8x16_t field = vshrq_n_u8(spreader.mask(planes[Bits - 1], quarter), 7);
        for (int bit = Bits - 2; bit >= 0; --bit) {
          field = vsliq_n_u8(spreader.mask(planes[bit], quarter), field, 1);
        }
        symbols[quarter] = table.at(field);
      }
    }
    if constexpr (Escape) {
      uint8x16_t all = planes[0];
      for (int bit = 1; bit < Bits; ++bit) all = vandq_u8(all, planes[bit]);
      const Merge merge(vget_low_u8(all));
      for (int quarter = 0; quarter < 4; ++quarter) {
        symbols[quarter] = merge.into(symbols[quarter], quarter, child);
      }
      child += merge.count();
      last = merge.bits();
    }
    store(out + i, symbols);
  }
  if constexpr (!Escape) return 0;
  // The last vector may have counted what lies past the last field.
  const std::uint64_t excess = count % kVector == 0 ? 0 : last & ~below(count % kVector);
  return static_cast<std::size_t>(child - args.child) - (counts_up_to(vcreate_u8(excess)) >> 56);
}

std::size_t copy_bytes(const FieldArgs& args, std::uint8_t* out) {
  for (std::size_t i = 0; i < args.count; i += kVector) {
    uint8x16_t symbols[4];
    for (std::size_t n = 0; n < 4; ++n) symbols[n] = vld1q_u8(args.fields + i + n * kQuarter);
    store(out + i, symbols);
  }
  return 0;
}

std::size_t sparse_field(const FieldArgs& args, std::uint8_t* out) {
  const bool escape = args.child != nullptr;
  switch (args.bits) {
    case 1:
      return escape ? sparse_field_of<1, true>(args, out) : sparse_field_of<1, false>(args, out);
    case 2:
      return escape ? sparse_field_of<2, true>(args, out) : sparse_field_of<2, false>(args, out);
    case 3:
      return escape ? sparse_field_of<3, true>(args, out) : sparse_field_of<3, false>(args, out);
    case 4:
      return escape ? sparse_field_of<4, true>(args, out) : sparse_field_of<4, false>(args, out);
    case 5:
      return escape ? sparse_field_of<5, true>(args, out) : sparse_field_of<5, false>(args, out);
    case 6:
      return escape ? sparse_field_of<6, true>(args, out) : sparse_field_of<6, false>(args, out);
    default:
      return copy_bytes(args, out);
  }
}

// The dense fields of a block, read vector by vector; `Step` is the vector's number modulo 4, so
// that every shift is a constant and packed groups are loaded once.
template <int Bits>
class DenseReader {
 public:
  DenseReader(const std::uint8_t* fields, std::size_t count)
      : fours_(fields),
        twos_(fours_ + ((Bits & 4) != 0 ? dense_bytes(count, 4) : 0)),
        ones_(twos_ + ((Bits & 2) != 0 ? dense_bytes(count, 2) : 0)) {}

  template <int Step>
  [[gnu::always_inline]] inline void next(uint8x16_t (&fields)[4]) {
    if constexpr ((Bits & 4) != 0 && Step % 2 == 0) load(fours_, four_);
    if constexpr ((Bits & 2) != 0 && Step == 0) load(twos_, two_);
    uint8x16_t ones = vdupq_n_u8(0);
    if constexpr ((Bits & 1) != 0) {
      ones = vld1q_u8(ones_);
      ones_ += 8;
    }
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint8x16_t value = vdupq_n_u8(0);
      if constexpr ((Bits & 4) != 0) value = part<4, Step % 2>(four_[quarter]);
      if constexpr ((Bits & 2) != 0) {
        const uint8x16_t two = part<2, Step>(two_[quarter]);
        value = (Bits & 4) != 0 ? vsliq_n_u8(two, value, 2) : two;
      }
      if constexpr ((Bits & 1) != 0) {
        const uint8x16_t one = spreader_.mask(ones, quarter);
        value = Bits == 1 ? vshrq_n_u8(one, 7) : vsliq_n_u8(one, value, 1);
      }
      fields[quarter] = value;
    }
  }

 private:
  static void load(const std::uint8_t*& from, uint8x16_t (&group)[4]) {
    for (std::size_t i = 0; i < 4; ++i) group[i] = vld1q_u8(from + i * kQuarter);
    from += kVector;
  }

  // Field `Index` of `Width` bits of every byte.
  template <int Width, int Index>
  static uint8x16_t part(uint8x16_t group) {
    constexpr int kShift = Width * Index;
    if constexpr (kShift != 0) group = vshrq_n_u8(group, kShift);
    if constexpr (kShift + Width < 8) group = vandq_u8(group, vdupq_n_u8((1 << Width) - 1));
    return group;
  }

  const std::uint8_t* fours_;
  const std::uint8_t* twos_;
  const std::uint8_t* ones_;
  uint8x16_t four_[4];
  uint8x16_t two_[4];
  BitSpreader spreader_;
};

// The bits of four quarters of masks.
uint8x8_t bits_of_masks(const uint8x16_t (&masks)[4]) {
  const uint8x16_t weights = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  const uint8x16_t low = vpaddq_u8(vandq_u8(masks[0], weights), vandq_u8(masks[1], weights));
  const uint8x16_t high = vpaddq_u8(vandq_u8(masks[2], weights), vandq_u8(masks[3], weights));
  const uint8x16_t bits = vpaddq_u8(low, high);
  return vget_low_u8(vpaddq_u8(bits, bits));
}

template <int Bits, bool Escape>
struct DenseField {
  DenseReader<Bits> reader;
  Table<Bits> table;
  const std::uint8_t* child;
  std::uint8_t* out;

  template <int Step>
  [[gnu::always_inline]] inline void step() {
    uint8x16_t symbols[4];
    reader.template next<Step>(symbols);
    uint8x16_t masks[4];
    for (int quarter = 0; quarter < 4; ++quarter) {
      masks[quarter] = vceqq_u8(symbols[quarter], vdupq_n_u8((1 << Bits) - 1));
      symbols[quarter] = table.at(symbols[quarter]);
    }
    if constexpr (Escape) {
      const Merge merge(bits_of_masks(masks));
      for (int quarter = 0; quarter < 4; ++quarter) {
        symbols[quarter] = merge.into(symbols[quarter], quarter, child);
      }
      child += merge.count();
    }
    store(out, symbols);
    out += kVector;
  }
};

template <int Bits, bool Escape>
std::size_t dense_field_of(const FieldArgs& args, std::uint8_t* out) {
  DenseField<Bits, Escape> field{
      {args.fields, args.count}, Table<Bits>(args.table), args.child, out};
  for_each_vector(args.count, field);
  return static_cast<std::size_t>(field.child - args.child);
}

std::size_t dense_field(const FieldArgs& args, std::uint8_t* out) {
  const bool escape = args.child != nullptr;
  switch (args.bits) {
    case 1:
      return escape ? sparse_field_of<1, true>(args, out) : sparse_field_of<1, false>(args, out);
    case 2:
      return escape ? dense_field_of<2, true>(args, out) : dense_field_of<2, false>(args, out);
    case 3:
      return escape ? dense_field_of<3, true>(args, out) : dense_field_of<3, false>(args, out);
    case 4:
      return escape ? dense_field_of<4, true>(args, out) : dense_field_of<4, false>(args, out);
    case 5:
      return escape ? dense_field_of<5, true>(args, out) : dense_field_of<5, false>(args, out);
    case 6:
      return escape ? dense_field_of<6, true>(args, out) : dense_field_of<6, false>(args, out);
    default:
      return copy_bytes(args, out);
  }
}

void split(const std::uint8_t* plane, std::size_t count, const std::uint8_t* left,
           const std::uint8_t* right, std::uint8_t* out) {
  for (std::size_t i = 0; i < count; i += kVector, plane += 8) {
    const Merge ones(vld1_u8(plane));
    const Merge zeros = ones.complement();
    uint8x16_t symbols[4];
    for (int quarter = 0; quarter < 4; ++quarter) {
      symbols[quarter] = ones.into(zeros.only(quarter, left), quarter, right);
    }
    store(out + i, symbols);
    right += ones.count();
    left += zeros.count();
  }
}

template <int Bits>
struct LowBits {
  DenseReader<Bits> reader;
  std::uint8_t* out;

  template <int Step>
  [[gnu::always_inline]] inline void step() {
    uint8x16_t symbols[4];
    reader.template next<Step>(symbols);
    for (std::size_t i = 0; i < 4; ++i) {
      symbols[i] = vorrq_u8(symbols[i], vld1q_u8(out + i * kQuarter));
    }
    store(out, symbols);
    out += kVector;
  }
};

template <int Bits>
void or_low_bits_of(const std::uint8_t* fields, std::size_t count, std::uint8_t* out) {
  LowBits<Bits> low{{fields, count}, out};
  for_each_vector(count, low);
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

std::size_t count_all_ones(const std::uint8_t* planes, std::size_t count, int bits) {
  constexpr std::size_t kStep = 8 * kQuarter;
  const std::size_t plane_bytes = (count + 7) / 8;
  uint16x8_t sums = vdupq_n_u16(0);  // each gains at most 16 a step
  std::size_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    uint8x16_t ones = vld1q_u8(planes + i / 8);
    for (int bit = 1; bit < bits; ++bit) {
      ones = vandq_u8(ones, vld1q_u8(planes + static_cast<std::size_t>(bit) * plane_bytes + i / 8));
    }
    sums = vpadalq_u8(sums, vcntq_u8(ones));
  }
  std::size_t total = vaddlvq_u16(sums);
  for (; i < count; i += kVector) {
    std::uint64_t ones = below(count - i);
    for (int bit = 0; bit < bits; ++bit) {
      ones &= load_bits(planes + static_cast<std::size_t>(bit) * plane_bytes + i / 8);
    }
    total += counts_up_to(vcreate_u8(ones)) >> 56;
  }
  return total;
}

// 4096 weights add 256 products of 16 bits to each of 16 lanes: below 256 * 255 * 32768 < 2^31.
template <std::size_t Columns>
void products(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  int32x4_t sums[Columns][4];
  for (std::size_t column = 0; column < Columns; ++column) {
    for (int i = 0; i < 4; ++i) sums[column][i] = vdupq_n_s32(0);
  }
  for (std::size_t i = 0; i < count; i += kVector) {
    for (std::size_t quarter = 0; quarter < 4; ++quarter) {
      const std::size_t at = i + quarter * kQuarter;
      const uint8x16_t bytes = vld1q_u8(weights + at);
      const int16x8_t first = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
      const int16x8_t second = vreinterpretq_s16_u16(vmovl_high_u8(bytes));
      for (std::size_t column = 0; column < Columns; ++column) {
        const int16x8_t x_first = vld1q_s16(x[column].whole + at);
        const int16x8_t x_second = vld1q_s16(x[column].whole + at + 8);
        int32x4_t(&sum)[4] = sums[column];
        sum[0] = vmlal_s16(sum[0], vget_low_s16(first), vget_low_s16(x_first));
        sum[1] = vmlal_high_s16(sum[1], first, x_first);
        sum[2] = vmlal_s16(sum[2], vget_low_s16(second), vget_low_s16(x_second));
        sum[3] = vmlal_high_s16(sum[3], second, x_second);
      }
    }
  }
  for (std::size_t column = 0; column < Columns; ++column) {
    out[column] = 0;
    for (const int32x4_t sum : sums[column]) out[column] += vaddlvq_s32(sum);
  }
}

std::int64_t dot(const std::uint8_t* weights, const Digits& x, std::size_t count) {
  std::int64_t sum;
  products<1>(weights, &x, count, &sum);
  return sum;
}

void dot_tile(const std::uint8_t* weights, const Digits* x, std::size_t count, std::int64_t* out) {
  products<kColumnTile>(weights, x, count, out);
}

#define ENTROLLM_DOT_PRODUCT __attribute__((target("arch=armv8.2-a+dotprod")))

// SDOT takes signed bytes: weights are multiplied as w - 128, and 128 times the sum of the
// activations is added.
template <std::size_t Columns>
ENTROLLM_DOT_PRODUCT void dot_products(const std::uint8_t* weights, const Digits* x,
                                       std::size_t count, std::int64_t* out) {
  int32x4_t high[Columns][2];
  int32x4_t low[Columns][2];
  for (std::size_t column = 0; column < Columns; ++column) {
    high[column][0] = high[column][1] = low[column][0] = low[column][1] = vdupq_n_s32(0);
  }
  for (std::size_t i = 0; i < count; i += kVector) {
    for (std::size_t quarter = 0; quarter < 4; ++quarter) {
      const std::size_t at = i + quarter * kQuarter;
      const std::size_t half = quarter % 2;
      const int8x16_t w = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(weights + at), vdupq_n_u8(0x80)));
      for (std::size_t column = 0; column < Columns; ++column) {
        high[column][half] = vdotq_s32(high[column][half], w, vld1q_s8(x[column].high + at));
        low[column][half] = vdotq_s32(low[column][half], w, vld1q_s8(x[column].low + at));
      }
    }
  }
  for (std::size_t column = 0; column < Columns; ++column) {
    const std::int64_t sum = x[column].sums[count / kVector] - x[column].sums[0];
    out[column] = 256 * std::int64_t{vaddvq_s32(vaddq_s32(high[column][0], high[column][1]))} +
                  vaddvq_s32(vaddq_s32(low[column][0], low[column][1])) + 128 * sum;
  }
}

ENTROLLM_DOT_PRODUCT std::int64_t dot_by_sdot(const std::uint8_t* weights, const Digits& x,
                                              std::size_t count) {
  std::int64_t sum;
  dot_products<1>(weights, &x, count, &sum);
  return sum;
}

ENTROLLM_DOT_PRODUCT void dot_tile_by_sdot(const std::uint8_t* weights, const Digits* x,
                                           std::size_t count, std::int64_t* out) {
  dot_products<kColumnTile>(weights, x, count, out);
}

#undef ENTROLLM_DOT_PRODUCT

}  // namespace

const Kernels kNeonKernels = {.name = "neon",
                              .sparse_field = sparse_field,
                              .dense_field = dense_field,
                              .split = split,
                              .or_low_bits = or_low_bits,
                              .count_all_ones = count_all_ones,
                              .dot = dot,
                              .dot_tile = dot_tile,
                              .flat = &kNeonFlatKernels};

const Kernels kNeonDotKernels = {.name = "neon-dot",
                                 .sparse_field = sparse_field,
                                 .dense_field = dense_field,
                                 .split = split,
                                 .or_low_bits = or_low_bits,
                                 .count_all_ones = count_all_ones,
                                 .dot = dot_by_sdot,
                                 .dot_tile = dot_tile_by_sdot,
                                 .flat = &kNeonDotFlatKernels};

}  // namespace entrollm
