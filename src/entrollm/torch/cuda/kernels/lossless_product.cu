// y = W x for a few vectors and lossless bfloat16 matrices. Weights are put together in registers
// and go to the matrix unit, which multiplies them with x in one, two or three parts of bfloat16
// that add up to it, and sums in float32. Sums are added in one order, so that results are always
// the same. A warp has several stripes on their way to shared memory, each lane those pieces that
// it will read. The compiler defines BATCH, TYPE of x and y (0 float32, 1 bfloat16, 2 float16),
// THREADS and STAGES, the stripes of a warp in shared memory.
#include "lossless.cuh"

namespace {

constexpr int kBatch = BATCH;
constexpr int kWarps = THREADS / kLanes;
constexpr int kStages = STAGES;
constexpr int kStripeBytes = kStripePieces * kLanes * 16;
constexpr int kParts = TYPE == 0 ? 3 : TYPE == 1 ? 1 : 2;
constexpr int kSides = kBatch * kParts;  // columns of the matrix unit's right side
constexpr int kSideColumns = 8;          // that one product takes
constexpr int kProducts = (kSides + kSideColumns - 1) / kSideColumns;
constexpr int kSumColumns = (kSides + 1) / 2 * 2;
constexpr int kQuadsAhead = 16;                   // of x, that a thread loads at a time
constexpr int kChains = 2;                        // of products, which need not wait for each other
constexpr int kPatches = 2;                       // that a lane loads at a time
constexpr int kPatchedRows = kTileRows / kWarps;  // of a warp
static_assert(kTileRows % kWarps == 0, "warps patch equally many rows");

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
  int group;          // tiles that the warps of a block share out among them at a time
};

// Sums of a tile.
struct TileSums {
  float warps[kWarps][kTileRows][kSumColumns];
  float patches[kTileRows][kBatch];
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
      if (in_group < min(work.launch.group, work.tiles - first)) break;
      stripe = threadIdx.x / kLanes;
      in_group = 0;
      first += work.launch.group;
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

// The stripes of a warp in shared memory, in the order in which it needs them.
struct Ring {
  Reader reader;
  u32 address;  // of a lane's pieces in the first stage
  int bases[kStages] = {};

  // Of the stripe in a stage.
  __device__ __forceinline__ int base(int stage) const {
    int found = bases[0];
#pragma unroll
    for (int i = 1; i < kStages; ++i) {
      if (stage == i) found = bases[i];
    }
    return found;
  }

  __device__ __forceinline__ Ring(const Work& work, const u8* memory)
      : reader(work),
        address(shared_address(memory) + threadIdx.x / kLanes * (kStages * kStripeBytes) +
                threadIdx.x % kLanes * 16) {}

  // Requests the next stripe, if there is one, for a stage.
  __device__ __forceinline__ void request(int stage) {
    if (reader.more) {
      const u32 to = address + stage * kStripeBytes;
#pragma unroll
      for (int i = 0; i < kStripePieces; ++i) {
        asm volatile(
            "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to + i * (kLanes * 16)),
            "l"(reader.from + i * kLanes)
            : "memory");
      }
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        if (stage == i) bases[i] = reader.base;
      }
      reader.advance();
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  // Waits for the oldest request.
  __device__ __forceinline__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
  }

  __device__ __forceinline__ void read(int stage, Stripe& stripe) const {
#pragma unroll
    for (int i = 0; i < kStripePieces; ++i) {
      stripe.pieces[i] = load_shared(address + stage * kStripeBytes + i * (kLanes * 16));
    }
  }
};

// Multiplies the quarters of a stripe from kQuarter on with x, whose addresses are a lane's.
template <int kQuarter>
__device__ __forceinline__ void multiply_quarters(const Stripe& stripe, u32 base,
                                                  const u32 (&x)[kProducts],
                                                  Product (&products)[kProducts][kChains]) {
  if constexpr (kQuarter < kQuarters) {
    u32 words[kQuarterSteps][kStepWords];
    stripe.unpack<kQuarter>(base, words);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        const uint4 right = load_shared(x[i] + (kQuarter * 2 + half) * kQuarterColumns);
        products[i][0].add(words[2 * half], right.x, right.y);
        products[i][1].add(words[2 * half + 1], right.z, right.w);
      }
    }
    multiply_quarters<kQuarter + 1>(stripe, base, x, products);
  }
}

// Four values of x. Loads stay in this order among those of weights.
__device__ __forceinline__ uint2 load_quad(const uint2* from) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}

__device__ __forceinline__ float4 load_quad(const float4* from) {
  float4 v;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "l"(from));
  return v;
}

// Stores the parts of four values of a vector.
__device__ __forceinline__ void store_quad(float4 values, u8* to, int stride) {
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
    *reinterpret_cast<uint2*>(to + part * stride) =
        make_uint2(__byte_perm(bits[0], bits[1], 0x7632), __byte_perm(bits[2], bits[3], 0x7632));
  }
}

// Brings a panel of x to shared memory, in rows of `stride` bytes, one for each part of a vector;
// warps share out the vectors. `requested` is called once the first values are on their way.
template <class Requested>
__device__ __forceinline__ void load_panel(const Launch& launch, int panel, int width, int stride,
                                           u8* to, const Requested& requested) {
  using Bits = typename Stored<TYPE>::Bits;
  constexpr int kVectors = kBatch < kWarps ? kBatch : kWarps;  // at a time
  constexpr int kThreads = kWarps / kVectors * kLanes;         // of each
  const int first = panel * (kStripeColumns / 4);
  const int quads = launch.columns / 4;
  const int each = width * (kStripeColumns / 4);
  bool is_first = true;
#pragma unroll 1
  for (int vector = threadIdx.x / kThreads; vector < kBatch; vector += kVectors) {
    if (static_cast<int>(threadIdx.x) >= kVectors * kThreads) break;
    const Bits* from =
        static_cast<const Bits*>(launch.x) + static_cast<long long>(vector) * quads + first;
    u8* row = to + vector * kParts * stride;
#pragma unroll 1
    for (int begin = threadIdx.x % kThreads; begin < each; begin += kThreads * kQuadsAhead) {
      Bits bits[kQuadsAhead];
#pragma unroll
      for (int i = 0; i < kQuadsAhead; ++i) {
        const int at = begin + i * kThreads;
        bits[i] = Bits{};
        if (at < each && first + at < quads) bits[i] = load_quad(from + at);
      }
      if (is_first) requested();
      is_first = false;
#pragma unroll
      for (int i = 0; i < kQuadsAhead; ++i) {
        const int at = begin + i * kThreads;
        if (at < each) store_quad(Stored<TYPE>::values(bits[i]), row + at * 8, stride);
      }
    }
  }
  if (is_first) requested();
}

// The patches of one row. A patched weight is stored as the power of two of its tile's base, which
// is taken back.
struct Patches {
  const u32* words;
  int at;
  int end;
  u32 loaded[kPatches];

  __device__ __forceinline__ void find(const Tile& tile, int index) {
    const int row = tile.index * kTileRows + index * kWarps + threadIdx.x / kLanes;
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

// Adds up and writes the outputs of a group, or in all panels but the last keeps their sums. `turn`
// counts groups: another warp begins every time.
__device__ __forceinline__ void finish(const Work& work, const TileSums* sums, int first, int turn,
                                       int panel, float* totals) {
  const Launch& launch = work.launch;
  const int tiles = min(launch.group, work.tiles - first);
  int i = threadIdx.x - turn % kWarps * kLanes;
  if (i < 0) i += THREADS;
#pragma unroll 1
  for (; i < tiles * kTileRows * kBatch; i += THREADS) {
    const int vector = i % kBatch;
    const int row = i / kBatch % kTileRows;
    const int in_group = i / (kBatch * kTileRows);
    const TileSums& of_tile = sums[in_group];
    float sum = of_tile.patches[row][vector];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
#pragma unroll
      for (int part = kParts - 1; part >= 0; --part) {
        sum += of_tile.warps[warp][row][vector * kParts + part];
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

__device__ __forceinline__ void store_sums(TileSums& sums,
                                           const Product (&products)[kProducts][kChains],
                                           float (&patched)[kPatchedRows][kBatch]) {
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    const int column = i * kSideColumns + lane % 4 * 2;
    if (column >= kSides) continue;
    const float (&a)[4] = products[i][0].sums;
    const float (&b)[4] = products[i][1].sums;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(&sums.warps[warp][lane / 4 + half * 8][column]) =
          make_float2(a[half * 2] + b[half * 2], a[half * 2 + 1] + b[half * 2 + 1]);
    }
  }
#pragma unroll
  for (int row = 0; row < kPatchedRows; ++row) {
#pragma unroll
    for (int vector = 0; vector < kBatch; ++vector) {
      float sum = patched[row][vector];
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(~0u, sum, distance);
      }
      if (lane == 0) sums.patches[row * kWarps + warp][vector] = sum;
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply_lossless(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) u8 memory[];
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int blocks = gridDim.x;
  const Work work{launch, (launch.tiles - static_cast<int>(blockIdx.x) + blocks - 1) / blocks};
  TileSums* sums = reinterpret_cast<TileSums*>(memory + kWarps * kStages * kStripeBytes);
  const int stride = launch.panel_stripes * kStripeColumns * 2 + 64;  // rows begin in other banks
  u8* x = reinterpret_cast<u8*>(sums + 2 * launch.group);
  float* totals = reinterpret_cast<float*>(x + stride * kSides);
  // Columns of the right side past the last are copies of it, and their sums are not read.
  u32 lane_x[kProducts];
#pragma unroll
  for (int i = 0; i < kProducts; ++i) {
    const int side = min(i * kSideColumns + lane / 4, kSides - 1);
    lane_x[i] = shared_address(x) + side * stride + lane % 4 * 16;
  }

  // What does not depend on the previous kernel is requested first.
  Ring ring(work, memory);
  ring.request(0);
  Patches next_patches[kPatchedRows];
#pragma unroll
  for (int i = 0; i < kPatchedRows; ++i) next_patches[i].find(work.tile(0), i);
  wait_for_previous();
  int stage = 0;
#pragma unroll 1
  for (int panel = 0; panel < launch.stripes; panel += launch.panel_stripes) {
    const int width = min(launch.panel_stripes, launch.stripes - panel);
    // With more requested, x would arrive last.
    load_panel(launch, panel, width, stride, x, [&] {
      if (panel > 0) return;
#pragma unroll
      for (int i = 1; i < kStages; ++i) ring.request(i);
    });
    __syncthreads();
    if (panel == 0) let_next_begin();
    int turn = 0;
#pragma unroll 1
    for (int first = 0; first < work.tiles; first += launch.group, ++turn) {
      TileSums* of_group = sums + turn % 2 * launch.group;
      const int tiles = min(launch.group, work.tiles - first);
      int at = warp;
#pragma unroll 1
      for (int in_group = 0; in_group < tiles; ++in_group, at -= width) {
        const Tile tile = work.tile(first + in_group);
        const float stored =
            __uint_as_float(static_cast<u32>(__ldg(tile.matrix->bases + tile.index)) << 23);
        Patches patches[kPatchedRows];
        const int next = first + in_group + 1;
        const Tile next_tile = work.tile(next < work.tiles ? next : 0);
#pragma unroll
        for (int i = 0; i < kPatchedRows; ++i) {
          patches[i] = next_patches[i];
          patches[i].load();
          next_patches[i].find(next_tile, i);
        }
        Product products[kProducts][kChains] = {};
        float patched[kPatchedRows][kBatch] = {};
        const auto patch = [&](int i) {
          patches[i].add(stored, panel * kStripeColumns, width * kStripeColumns, x, stride,
                         patched[i]);
        };
#pragma unroll 1
        for (; at < width; at += kWarps) {
          Stripe stripe;
          ring.wait();
          ring.read(stage, stripe);
          u32 from[kProducts];
#pragma unroll
          for (int i = 0; i < kProducts; ++i) from[i] = lane_x[i] + at * (kStripeColumns * 2);
          multiply_quarters<0>(stripe, both_halves(ring.base(stage)), from, products);
          ring.request(stage);
          stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
          for (int i = 0; i < kPatchedRows; ++i) {
            if (patches[i].at < patches[i].end) patch(i);
          }
        }
#pragma unroll
        for (int i = 0; i < kPatchedRows; ++i) {
          while (patches[i].at < patches[i].end) patch(i);
        }
        store_sums(of_group[in_group], products, patched);
      }
      __syncthreads();
      finish(work, of_group, first, turn, panel, totals);
    }
  }
}
