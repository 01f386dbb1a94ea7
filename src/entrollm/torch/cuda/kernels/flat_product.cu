// y = W x for up to 32 vectors and flat matrices. Fields are loaded to registers ahead of the
// products, the first before the previous kernel of the stream has ended, and multiplied by the
// matrix unit. The compiler defines BATCH, TYPE of x and y, THREADS, AHEAD (stripes that a warp
// loads ahead), OPEN_TILES, PREPARED (1 if flat_prepare.cu has rounded x) and what flat.cuh needs;
// STATE_BYTES is the room for State.
#include "accumulator.cuh"
#include "flat.cuh"

namespace {

constexpr int kWarps = THREADS / kLanes;
constexpr int kAhead = AHEAD;
constexpr bool kPrepared = PREPARED;
// Tiles that can be in progress at once.
constexpr int kOpenTiles = OPEN_TILES;
// Room for a row's sums. Eight rows begin in different banks where vectors are many.
constexpr int kRowVectors = kBatch >= 4 && kBatch % 8 != 4 ? kBatch + 4 : kBatch;
// Groups of warps that round a vector each.
constexpr int kGroups = kBatch >= 8 ? 8 : kBatch >= 4 ? 4 : kBatch >= 2 ? 2 : 1;
static_assert(kPrepared || kWarps % kGroups == 0);
constexpr int kHeadPieces = sizeof(TileHead) / 16;

struct Launch {
  FlatMatrix matrices[kMaxMatrices];
  const void* x;
  void* y;
  const u8* digits;    // of all vectors, in the order of raw units
  const u16* numbers;  // by column and vector, the numbers that the digits are of, plus 2^15
  const float* scales;
  const int* totals;
  int* partial;  // sums by tile, digit, vector and row, if tiles are split
  u32* arrived;  // parts of every tile that are in them
  int count;
  int columns;  // a multiple of 4; x has zeros where the matrix has no column
  int y_stride;
  int vectors;     // that have an output
  Divisor splits;  // parts that the columns of a tile are split into, each for another block
  Divisor shares;  // of a tile's part, each for one warp
};

struct State {
  TileHead heads[kOpenTiles];
  int sums[kOpenTiles][kTileRows][kRowVectors][2];
  u32 done[kOpenTiles];    // shares that are in the sums
  u32 rounds[kOpenTiles];  // tiles that used the place before
  Rounded rounded;
};

static_assert(sizeof(State) <= STATE_BYTES, "plans of shared memory must leave room for it");

// What a block works on: a range of columns of the tiles of its group.
struct Work {
  const FlatMatrix& matrix;
  const Launch& launch;
  int group;
  int tiles;
  int first;  // stripe
  int range;  // stripes

  __device__ __forceinline__ int tile(int local) const { return group + local * matrix.groups; }

  // Where share `index` of a tile begins; that after the last ends.
  __device__ __forceinline__ int begin(int index) const {
    return launch.shares.divide(range * index);
  }
};

// Loads the stripes of a warp one after another.
class Reader {
 public:
  __device__ __forceinline__ explicit Reader(const Work& work)
      : work_(work), share_(threadIdx.x / kLanes) {
    begin();
  }

  __device__ __forceinline__ void next(Fields& fields) {
    if (left_ == 0) return;
    fields.load(from_, bits_);
    from_ += bits_ * kLanes;
    if (--left_ == 0) {
      share_ += kWarps;
      begin();
    }
  }

 private:
  __device__ __forceinline__ void begin() {
    const int local = work_.launch.shares.divide(share_);
    if (local >= work_.tiles) return;
    const int index = share_ - local * work_.launch.shares;
    const int begin = work_.begin(index);
    left_ = work_.begin(index + 1) - begin;
    const TilePlace place(work_.matrix, work_.tile(local));
    bits_ = place.bits;
    from_ = place.data + (work_.first + begin) * (bits_ * kLanes);
  }

  const Work& work_;
  int share_;
  int left_ = 0;
  int bits_ = 0;
  const uint4* from_ = nullptr;
};

// Multiplies a stripe of fields of kBits bits.
template <int kBits>
__device__ __forceinline__ void multiply_fields(const Fields& fields, u32 digits_at,
                                                Accumulator (&sums)[kSums]) {
  Digits digits;
#pragma unroll
  for (int step = 0; step < kStripeSteps; ++step) {
    if (step % kPhases == 0) digits.load(digits_at + step * kStepBytes * kBatch);
    sums[step % kSums].multiply(
        fields.unpacked<kBits>(4 * step), fields.unpacked<kBits>(4 * step + 1),
        fields.unpacked<kBits>(4 * step + 2), fields.unpacked<kBits>(4 * step + 3), digits);
  }
}

template <int kBits>
__device__ __forceinline__ void multiply_stripe(const Fields& fields, int bits, u32 digits_at,
                                                Accumulator (&sums)[kSums]) {
  if (kBits == kMinBits || bits == kBits) {
    multiply_fields<kBits>(fields, digits_at, sums);
  } else if constexpr (kBits > kMinBits) {
    multiply_stripe<kBits - 1>(fields, bits, digits_at, sums);
  }
}

// The patches of a tile that are a share's. A lane loads its first ones before it multiplies.
class Patches {
 public:
  __device__ __forceinline__ Patches(const FlatMatrix& matrix, const TileHead& head, int index,
                                     int shares)
      : patches_(matrix.patches),
        at_(head.patch_begin + index * kLanes + threadIdx.x % kLanes),
        end_(head.patch_end),
        step_(shares * kLanes) {
    load();
  }

  // Calls add(patch, exists) for each. All lanes call it together, those that have none left with
  // `exists` false.
  template <class Add>
  __device__ __forceinline__ void each(Add add) {
    while (__any_sync(~0u, at_ < end_)) {
      u32 now[kTaken];
      bool exists[kTaken];
#pragma unroll
      for (int i = 0; i < kTaken; ++i) {
        now[i] = taken_[i];
        exists[i] = at_ + i * step_ < end_;
      }
      at_ += kTaken * step_;
      load();
#pragma unroll
      for (int i = 0; i < kTaken; ++i) add(now[i], exists[i]);
    }
  }

 private:
  static constexpr int kTaken = kPrepared ? 2 : 4;

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kTaken; ++i) {
      taken_[i] = at_ + i * step_ < end_ ? __ldg(&patches_[at_ + i * step_]) : 0;
    }
  }

  const u32* patches_;
  int at_;
  int end_;
  int step_;
  u32 taken_[kTaken];
};

// The parts of a patch.
__device__ __forceinline__ int patch_row(u32 patch) { return patch & 15; }
__device__ __forceinline__ int patch_difference(u32 patch) {
  return static_cast<int>(patch >> 4 & 511) - 256;
}
__device__ __forceinline__ int patch_column(u32 patch) { return patch >> 13; }

// Adds a patch that the lane alone has, with digits in shared memory.
__device__ __forceinline__ void add_patch(u32 patch, const u8* digits, int (*out)[kRowVectors][2]) {
  const int column = patch_column(patch);
  const int inside = column % kFlatStepColumns;
  const u8* at = digits + column / kFlatStepColumns * (kStepBytes * kBatch) + inside % 16 / 4 * 8 +
                 inside / 16 * 4 + inside % 4;
#pragma unroll
  for (int vector = 0; vector < kBatch; ++vector) {
#pragma unroll
    for (int digit = 0; digit < 2; ++digit) {
      atomicAdd(
          &out[patch_row(patch)][vector][digit],
          patch_difference(patch) * static_cast<signed char>(at[vector * kStepBytes + digit * 32]));
    }
  }
}

// Adds the patches of neighbouring lanes, one vector per lane, with numbers in global memory.
// Several are requested before the first is added.
__device__ __forceinline__ void add_patches_together(u32 patch, bool exists, const u16* numbers,
                                                     int (*out)[kRowVectors][2]) {
  constexpr int kAtOnce = kLanes / kBatch;  // patches that are added by different lanes
  constexpr int kTurns = 8;
  const int lane = threadIdx.x % kLanes;
  const int place = lane / kBatch;
  const int vector = lane % kBatch;
  const u32 present = __ballot_sync(~0u, exists);
  const int first_lane = __ffs(present) - 1;
  const int count = __popc(present);
  for (int first = 0; first < count; first += kAtOnce * kTurns) {
    u32 its[kTurns];
    int number[kTurns];
    bool is[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int from = first + turn * kAtOnce + place;
      its[turn] = __shfl_sync(~0u, patch, (first_lane + from) & 31);
      is[turn] = from < count && place < kAtOnce;
      if (is[turn]) number[turn] = __ldcg(&numbers[patch_column(its[turn]) * kBatch + vector]);
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (!is[turn]) continue;
      const int value = number[turn] - static_cast<int>(kBias);
      const int high = (value + 128) >> 8;
      int* sums = out[patch_row(its[turn])][vector];
      atomicAdd(&sums[0], patch_difference(its[turn]) * high);
      atomicAdd(&sums[1], patch_difference(its[turn]) * (value - 256 * high));
    }
  }
}

// Copies the head of a tile to its place. All lanes of a warp call this.
__device__ __forceinline__ void load_head(TileHead& to, const TileHead* from) {
  const int lane = threadIdx.x % kLanes;
  if (lane < kHeadPieces) {
    reinterpret_cast<uint4*>(&to)[lane] = __ldg(reinterpret_cast<const uint4*>(from) + lane);
  }
}

// Scales the sum of a row of a tile and writes it.
__device__ __forceinline__ void write_sum(const Launch& launch, const FlatMatrix& matrix,
                                          const Rounded& rounded, const TileHead& head, int tile,
                                          int row, int vector, int high, int low) {
  if (tile * kTileRows + row >= matrix.rows || vector >= launch.vectors) return;
  const double total = rounded.sum[vector];
  const double sum = 256.0 * high + low + head.base * total;
  const Row& at = head.rows[row];
  const double value = (sum * at.scale + total * at.offset) * rounded.scale[vector];
  store_value(launch.y,
              static_cast<long long>(vector) * launch.y_stride + matrix.y_begin + at.index,
              static_cast<float>(value), kType);
}

// Writes a tile whose sums are complete, or adds them to those of the other blocks that have a part
// of it, and makes its place ready for another. All lanes of a warp call this.
__device__ __forceinline__ void finish_tile(const Work& work, State& state, int local, int y_tile) {
  const Launch& launch = work.launch;
  const int lane = threadIdx.x % kLanes;
  const int open = local % kOpenTiles;
  const int tile = work.tile(local);
  const bool alone = launch.splits == 1;
  constexpr int kTileSums = kTileRows * kBatch;
  int* highs = launch.partial + static_cast<long long>(y_tile) * (kTileSums * 2);
  int* lows = highs + kTileSums;
  for (int i = lane; i < kTileSums; i += kLanes) {
    // Neighbouring lanes write neighbouring rows.
    const int row = i % kTileRows;
    const int vector = i / kTileRows;
    int* sums = state.sums[open][row][vector];
    if (alone) {
      write_sum(launch, work.matrix, state.rounded, state.heads[open], tile, row, vector, sums[0],
                sums[1]);
    } else {
      atomicAdd(&highs[i], sums[0]);
      atomicAdd(&lows[i], sums[1]);
    }
    sums[0] = sums[1] = 0;
  }
  if (kPrepared && !alone) {
    __threadfence();
    __syncwarp();
    u32 before = 0;
    if (lane == 0) before = atomicAdd(&launch.arrived[y_tile], 1);
    __threadfence();
    if (__shfl_sync(~0u, before, 0) + 1 == static_cast<u32>(launch.splits)) {
      constexpr int kTurns = (kTileSums + kLanes - 1) / kLanes;
      int high[kTurns];
      int low[kTurns];
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        high[turn] = __ldcg(&highs[turn * kLanes + lane]);
        low[turn] = __ldcg(&lows[turn * kLanes + lane]);
      }
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int i = turn * kLanes + lane;
        write_sum(launch, work.matrix, state.rounded, state.heads[open], tile, i % kTileRows,
                  i / kTileRows, high[turn], low[turn]);
      }
    }
  }
  __syncwarp();
  if (local + kOpenTiles < work.tiles) {
    load_head(state.heads[open], work.matrix.heads + work.tile(local + kOpenTiles));
  }
  __syncwarp();
  if (lane == 0) {
    state.done[open] = 0;
    fence_block();
    ++*static_cast<volatile u32*>(&state.rounds[open]);
  }
}

// Requests the digits of a block's columns that flat_prepare.cu has made.
__device__ __forceinline__ void copy_digits(u8* to, const u8* from, int size) {
  const u32 address = shared_address(to);
#pragma unroll 4
  for (int at = threadIdx.x * 16; at < size; at += THREADS * 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address + at), "l"(from + at)
                 : "memory");
  }
}

// Where digits of the vectors of one block are stored.
struct FlatDigits {
  u8* raws;
  int words;

  __device__ __forceinline__ int dozens() const { return (words + 2) / 3; }

  __device__ __forceinline__ u32 store(int dozen, int vector, const u32 (&rounded)[kDozen]) const {
    store_raws(raws, words, dozen, vector, rounded);
    return sum_of(rounded);
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    multiply_flat(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) u8 memory[];
  State& state = *reinterpret_cast<State*>(memory);
  u8* digits = memory + STATE_BYTES;
  int index = 0;
  int y_tiles = 0;  // tiles of the matrices before
  while (index + 1 < launch.count &&
         static_cast<int>(blockIdx.x) >= launch.matrices[index + 1].cta_begin) {
    y_tiles += launch.matrices[index].tiles;
    ++index;
  }
  const FlatMatrix& matrix = launch.matrices[index];
  const int block = blockIdx.x - matrix.cta_begin;
  const int group = launch.splits.divide(block);
  const int split = block - group * launch.splits;
  const int first = launch.splits.divide(matrix.stripes * split);
  const int tiles = group < matrix.tiles ? matrix.groups.divide(matrix.tiles - 1 - group) + 1 : 0;
  const Work work{matrix, launch, group,
                  tiles,  first,  launch.splits.divide(matrix.stripes * (split + 1)) - first};

  // What does not depend on the previous kernel is requested first.
  Reader reader(work);
  Fields ahead[kAhead];
  reader.next(ahead[0]);
  // With more requested, x would arrive last.
  const auto read_ahead = [&] {
#pragma unroll
    for (int i = 1; i < kAhead; ++i) reader.next(ahead[i]);
  };
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  for (int i = warp; i < min(tiles, kOpenTiles); i += kWarps) {
    load_head(state.heads[i], matrix.heads + work.tile(i));
  }
  for (int i = threadIdx.x; i < kOpenTiles * kTileRows * kRowVectors * 2; i += THREADS) {
    (&state.sums[0][0][0][0])[i] = 0;
  }
  if (threadIdx.x < kOpenTiles) state.done[threadIdx.x] = state.rounds[threadIdx.x] = 0;
  wait_for_previous();
  constexpr int kStripeBytes = kStripeSteps * kStepBytes * kBatch;
  if constexpr (kPrepared) {
    copy_digits(digits, launch.digits + static_cast<long long>(first) * kStripeBytes,
                work.range * kStripeBytes);
    if (threadIdx.x < kBatch) {
      state.rounded.scale[threadIdx.x] = __ldcg(&launch.scales[threadIdx.x]);
      state.rounded.sum[threadIdx.x] = __ldcg(&launch.totals[threadIdx.x]);
    }
    read_ahead();
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    const FlatDigits out{digits, matrix.stripes * (kStripeColumns / 4)};
    const auto vector = [&](int i) {
      return Vector(launch.x, i, launch.columns, matrix.column_scale);
    };
    constexpr int kThreads = THREADS / kGroups;
    const int mine = threadIdx.x / kThreads;
    round_vector<kGroups, kThreads>(vector(mine), mine, 0, out, state.rounded, read_ahead);
#pragma unroll 1
    for (int i = mine + kGroups; i < kBatch; i += kGroups)
      round_vector<kGroups, kThreads>(vector(i), i, i / kGroups, out, state.rounded, [] {});
  }
  __syncthreads();
  let_next_begin();

  const u32 digits_at = shared_address(digits) + Digits::offset<kPhases>(lane);
  for (int share = warp; share < tiles * launch.shares; share += kWarps) {
    const int local = launch.shares.divide(share);
    const int in_tile = share - local * launch.shares;
    const int begin = work.begin(in_tile);
    const int stripes = work.begin(in_tile + 1) - begin;
    const int bits = TilePlace(matrix, work.tile(local)).bits;
    const int open = local % kOpenTiles;
    const u32 round = local / kOpenTiles;
    const auto is_open = [&] { return *static_cast<volatile u32*>(&state.rounds[open]) == round; };
    while (!is_open()) __nanosleep(32);
    fence_block();
    Patches patches(matrix, state.heads[open], in_tile, launch.shares);
    Accumulator parts[kSums];
#pragma unroll
    for (Accumulator& part : parts) part.clear();
#pragma unroll 1
    for (int stripe = begin; stripe < begin + stripes; ++stripe) {
      const Fields now = ahead[0];
#pragma unroll
      for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
      reader.next(ahead[kAhead - 1]);
      multiply_stripe<kMaxBits>(now, bits, digits_at + stripe * kStripeBytes, parts);
    }
    auto* out = state.sums[open];
    const int left = first * kStripeColumns;
    const int width = work.range * kStripeColumns;
    // Patches are sorted by column, so that those of a block's columns are neighbours.
    patches.each([&](u32 patch, bool exists) {
      const int column = patch_column(patch) - left;
      exists &= column >= 0 && column < width;
      if constexpr (kPrepared) {
        add_patches_together(patch, exists, launch.numbers, out);
      } else {
        if (exists) add_patch(patch, digits, out);
      }
    });
    add_sums(parts, out);
    __syncwarp();
    u32 last = 0;
    if (lane == 0) {
      fence_block();
      last = atomicAdd(&state.done[open], 1) + 1 == static_cast<u32>(launch.shares);
      fence_block();
    }
    if (__shfl_sync(~0u, last, 0)) {
      __syncwarp();  // shows the other lanes what lane 0's fence made visible
      finish_tile(work, state, local, y_tiles + work.tile(local));
    }
    __syncwarp();
  }
}
