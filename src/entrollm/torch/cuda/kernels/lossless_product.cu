// y = W x for a few vectors and lossless bfloat16 matrices. Weights are put together in registers
// and go to the matrix unit, which multiplies them with x in one, two or three parts of bfloat16
// that add up to it, and sums in float32. Sums are added in one order, so that results are always
// the same. The compiler defines BATCH, TYPE of x and y (0 float32, 1 bfloat16, 2 float16),
// THREADS, and GROUP, the tiles that the warps of a block share out among them at a time.
#include "lossless.cuh"

namespace {

constexpr int kBatch = BATCH;
constexpr int kGroup = GROUP;
constexpr int kWarps = THREADS / kLanes;
constexpr int kParts = TYPE == 0 ? 3 : TYPE == 1 ? 1 : 2;
constexpr int kSides = kBatch * kParts;  // columns of the matrix unit's right side
constexpr int kSideColumns = 8;          // that one product takes
constexpr int kProducts = (kSides + kSideColumns - 1) / kSideColumns;
constexpr int kSumColumns = (kSides + 1) / 2 * 2;
constexpr int kPatches = TYPE == 0 ? 1 : 2;  // that a lane loads at a time
static_assert(kWarps >= kTileRows, "every warp patches one row");

struct Launch {
  LosslessMatrix matrices[kMaxMatrices];
  const void* x;
  void* y;
  int count;    // of matrices
  int tiles;    // of all matrices
  int columns;  // of x, a multiple of 4
  int y_stride;
  int stripes;        // of a tile
  int panel_stripes;  // stripes whose part of x is in shared memory together
};

// Sums of a group of tiles.
struct GroupSums {
  float warps[kGroup][kWarps][kTileRows][kSumColumns];
  float patches[kGroup][kTileRows][kBatch];
};

struct Tile {
  const LosslessMatrix* matrix;
  int index;

  __device__ __forceinline__ Tile(const Launch& launch, int tile) {
    int i = 0;
    while (i + 1 < launch.count && tile >= launch.matrices[i + 1].tile_begin) ++i;
    matrix = &launch.matrices[i];
    index = tile - matrix->tile_begin;
  }
};

// The tiles of a block: one after as many as there are blocks.
struct Work {
  const Launch& launch;
  int tiles;

  __device__ __forceinline__ Tile tile(int local) const {
    return Tile(launch, blockIdx.x + local * gridDim.x);
  }
};

// Goes through the stripes of a warp: of each panel of columns, and of each group of tiles.
struct Reader {
  const Work& work;
  int panel = 0;
  int width;
  int first = 0;  // tile of the group
  int in_group = 0;
  int stripe;
  bool more;
  const uint4* from;
  int base;

  __device__ __forceinline__ Reader(const Work& work)
      : work(work),
        width(min(work.launch.panel_stripes, work.launch.stripes)),
        stripe(threadIdx.x / kLanes),
        more(work.tiles > 0) {
    find();
  }

  __device__ __forceinline__ void advance() {
    stripe += kWarps;
    find();
  }

 private:
  __device__ __forceinline__ void find() {
    while (more) {
      for (; stripe >= width; stripe -= width) ++in_group;
      if (in_group < min(kGroup, work.tiles - first)) break;
      stripe = threadIdx.x / kLanes;
      in_group = 0;
      first += kGroup;
      if (first < work.tiles) continue;
      first = 0;
      panel += work.launch.panel_stripes;
      more = panel < work.launch.stripes;
      width = min(work.launch.panel_stripes, work.launch.stripes - panel);
    }
    if (!more) return;
    const Tile tile = work.tile(first + in_group);
    const long long at = static_cast<long long>(tile.index) * work.launch.stripes + panel + stripe;
    from = tile.matrix->data + at * (kStripePieces * kLanes) + threadIdx.x % kLanes;
    base = __ldg(tile.matrix->bases + tile.index);
  }
};

struct Product {
  float sums[4];

  __device__ __forceinline__ void add(const u32 (&left)[kStepWords], u32 right0, u32 right1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
};

__device__ __forceinline__ uint4 load_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}

// Multiplies the quarters of a stripe from kQuarter on with x, whose addresses are a lane's, and
// loads the next stripe in their place.
template <int kQuarter>
__device__ __forceinline__ void multiply_quarters(Stripe& stripe, u32 base, const Reader& next,
                                                  const u32 (&x)[kProducts],
                                                  Product (&products)[kProducts]) {
  if constexpr (kQuarter < kQuarters) {
    u32 words[kQuarterSteps][kStepWords];
    stripe.unpack<kQuarter>(base, words);
    if (next.more) {
      stripe.load(2 * kQuarter, next.from);
      stripe.load(2 * kQuarter + 1, next.from);
      // The words of exponents are used up three at a time.
      if constexpr (kQuarter > 0) stripe.load(kBytePieces + kQuarter - 1, next.from);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        const uint4 right = load_shared(x[i] + (kQuarter * 2 + half) * kQuarterColumns);
        products[i].add(words[2 * half], right.x, right.y);
        products[i].add(words[2 * half + 1], right.z, right.w);
      }
    }
    multiply_quarters<kQuarter + 1>(stripe, base, next, x, products);
  }
}

// Brings a panel of x to shared memory, in rows of `stride` bytes, one for each part of a vector.
__device__ __forceinline__ void load_panel(const Launch& launch, int panel, int width, int stride,
                                           u8* to) {
  using Bits = typename Stored<TYPE>::Bits;
  const int quads = launch.columns / 4;
  const int each = width * (kStripeColumns / 4);
#pragma unroll 1
  for (int i = threadIdx.x; i < each * kBatch; i += THREADS) {
    const int vector = i / each;
    const int inside = i - vector * each;
    const int quad = panel * (kStripeColumns / 4) + inside;
    float4 values = make_float4(0, 0, 0, 0);
    if (quad < quads) {
      values = Stored<TYPE>::values(
          static_cast<const Bits*>(launch.x)[static_cast<long long>(vector) * quads + quad]);
    }
    float rest[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      u32 bits[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // Cut off rather than rounded, so that what is left has eight bits fewer.
        bits[k] = __float_as_uint(rest[k]) & 0xffff0000u;
        rest[k] -= __uint_as_float(bits[k]);
      }
      *reinterpret_cast<uint2*>(to + (vector * kParts + part) * stride + inside * 8) =
          make_uint2(__byte_perm(bits[0], bits[1], 0x7632), __byte_perm(bits[2], bits[3], 0x7632));
    }
  }
}

// The patches of one row. A patched weight is stored as the power of two of its tile's base, which
// is taken back.
struct Patches {
  const u32* words;
  int at;
  int end;
  u32 loaded[kPatches];

  __device__ __forceinline__ void find(const Tile& tile) {
    const int row = tile.index * kTileRows + threadIdx.x / kLanes;
    words = tile.matrix->patches;
    at = __ldg(tile.matrix->patch_begins + row);
    end = __ldg(tile.matrix->patch_begins + row + 1);
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kPatches; ++i) {
      const int place = at + i * kLanes + threadIdx.x % kLanes;
      if (place < end) loaded[i] = __ldg(words + place);
    }
  }

  // Adds the products of the loaded ones whose columns are in a panel from `left` on, and loads
  // others.
  __device__ __forceinline__ void add(float stored, int left, int columns, const u8* x, int stride,
                                      float (&sums)[kBatch]) {
#pragma unroll
    for (int i = 0; i < kPatches; ++i) {
      const int column = static_cast<int>(loaded[i] & 0xffffu) - left;
      if (at + i * kLanes + static_cast<int>(threadIdx.x % kLanes) >= end || column < 0 ||
          column >= columns)
        continue;
      const float difference = __uint_as_float(loaded[i] & 0xffff0000u) - stored;
#pragma unroll
      for (int vector = 0; vector < kBatch; ++vector) {
        float value = 0;
#pragma unroll
        for (int part = kParts - 1; part >= 0; --part) {
          value += __uint_as_float(static_cast<u32>(*reinterpret_cast<const u16*>(
                                       x + (vector * kParts + part) * stride + column * 2))
                                   << 16);
        }
        sums[vector] = __fmaf_rn(difference, value, sums[vector]);
      }
    }
    at += kPatches * kLanes;
    load();
  }
};

// Adds up and writes the outputs of a group, or in all panels but the last keeps their sums.
__device__ __forceinline__ void finish(const Work& work, const GroupSums& sums, int first,
                                       int panel, float* totals) {
  const Launch& launch = work.launch;
  const int tiles = min(kGroup, work.tiles - first);
  const int group = first / kGroup;
  // Another warp begins every time.
  int i = threadIdx.x - group % kWarps * kLanes;
  if (i < 0) i += THREADS;
#pragma unroll 1
  for (; i < tiles * kTileRows * kBatch; i += THREADS) {
    const int vector = i % kBatch;
    const int row = i / kBatch % kTileRows;
    const int in_group = i / (kBatch * kTileRows);
    float sum = sums.patches[in_group][row][vector];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
#pragma unroll
      for (int part = kParts - 1; part >= 0; --part) {
        sum += sums.warps[in_group][warp][row][vector * kParts + part];
      }
    }
    float* total = totals + first * (kTileRows * kBatch) + i;
    if (panel > 0) sum += *total;
    if (panel + launch.panel_stripes < launch.stripes) {
      *total = sum;
      continue;
    }
    const Tile tile = work.tile(first + in_group);
    const int out = tile.index * kTileRows + row;
    if (out < tile.matrix->rows) {
      store_value(launch.y,
                  static_cast<long long>(vector) * launch.y_stride + tile.matrix->y_begin + out,
                  sum, TYPE);
    }
  }
}

__device__ __forceinline__ void store_sums(GroupSums& sums, int in_group,
                                           const Product (&products)[kProducts],
                                           float (&patched)[kBatch]) {
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    const int column = i * kSideColumns + lane % 4 * 2;
    if (column >= kSides) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(&sums.warps[in_group][warp][lane / 4 + half * 8][column]) =
          make_float2(products[i].sums[half * 2], products[i].sums[half * 2 + 1]);
    }
  }
#pragma unroll
  for (int vector = 0; vector < kBatch; ++vector) {
    float sum = patched[vector];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(~0u, sum, distance);
    }
    if (lane == 0 && warp < kTileRows) sums.patches[in_group][warp][vector] = sum;
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply_lossless(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) u8 memory[];
  GroupSums* sums = reinterpret_cast<GroupSums*>(memory);
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int blocks = gridDim.x;
  const Work work{launch, (launch.tiles - static_cast<int>(blockIdx.x) + blocks - 1) / blocks};
  const int stride = launch.panel_stripes * kStripeColumns * 2 + 64;  // rows begin in other banks
  u8* x = memory + 2 * sizeof(GroupSums);
  float* totals = reinterpret_cast<float*>(x + stride * kSides);
  // Columns of the right side past the last are copies of it, and their sums are not read.
  u32 lane_x[kProducts];
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    const int side = min(i * kSideColumns + lane / 4, kSides - 1);
    lane_x[i] = shared_address(x) + side * stride + lane % 4 * 16;
  }

  // What does not depend on the previous kernel is requested first.
  Reader reader(work);
  Stripe stripe;
  if (reader.more) {
#pragma unroll
    for (int i = 0; i < kStripePieces; ++i) stripe.load(i, reader.from);
  }
  Patches next_patches{};
  if (warp < kTileRows) next_patches.find(work.tile(0));
  wait_for_previous();
  int turn = 0;
#pragma unroll 1
  for (int panel = 0; panel < launch.stripes; panel += launch.panel_stripes) {
    const int width = min(launch.panel_stripes, launch.stripes - panel);
    load_panel(launch, panel, width, stride, x);
    __syncthreads();
    if (panel == 0) let_next_begin();
#pragma unroll 1
    for (int first = 0; first < work.tiles; first += kGroup, turn ^= 1) {
      const int tiles = min(kGroup, work.tiles - first);
      int at = warp;
#pragma unroll 1
      for (int in_group = 0; in_group < tiles; ++in_group, at -= width) {
        const Tile tile = work.tile(first + in_group);
        const float stored =
            __uint_as_float(static_cast<u32>(__ldg(tile.matrix->bases + tile.index)) << 23);
        Patches patches = next_patches;
        patches.load();
        const int next = first + in_group + 1;
        if (warp < kTileRows) next_patches.find(work.tile(next < work.tiles ? next : 0));
        Product products[kProducts] = {};
        float patched[kBatch] = {};
        const auto patch = [&] {
          if (patches.at < patches.end)
            patches.add(stored, panel * kStripeColumns, width * kStripeColumns, x, stride, patched);
        };
#pragma unroll 1
        for (; at < width; at += kWarps) {
          const u32 base = both_halves(reader.base);
          u32 from[kProducts];
#pragma unroll
          for (int i = 0; i < kProducts; ++i) from[i] = lane_x[i] + at * (kStripeColumns * 2);
          reader.advance();
          multiply_quarters<0>(stripe, base, reader, from, products);
          if constexpr (kSides <= 4) patch();  // while there are registers for sums
        }
        while (patches.at < patches.end) patch();
        store_sums(sums[turn], in_group, products, patched);
      }
      __syncthreads();
      finish(work, sums[turn], first, panel, totals);
    }
  }
}
