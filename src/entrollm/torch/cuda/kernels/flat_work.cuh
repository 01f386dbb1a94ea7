// What the products of flat matrices share: how a block reads its tiles, multiplies them by digits
// in shared memory, and writes their sums. The compiler defines BATCH, TYPE of x and y, THREADS,
// AHEAD (stripes that a warp loads ahead), OPEN_TILES, PREPARED (1 if flat_prepare.cu has rounded
// x) and what flat.cuh needs; STATE_BYTES is the room for State.
#pragma once

#include "accumulator.cuh"
#include "flat.cuh"
#include "flat_patches.cuh"

namespace {

constexpr int kWarps = THREADS / kLanes;
constexpr int kAhead = AHEAD;
// Tiles that can be in progress at once.
constexpr int kOpenTiles = OPEN_TILES;
// Groups of warps that round a vector each.
constexpr int kGroups = kBatch >= 8 ? 8 : kBatch >= 4 ? 4 : kBatch >= 2 ? 2 : 1;
static_assert(kPrepared || kWarps % kGroups == 0);
constexpr int kHeadPieces = sizeof(TileHead) / 16;
// The digits of all vectors for one stripe.
constexpr int kDigitBytes = kStripeSteps * kStepBytes * kBatch;

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
  int groups;
  int tiles;
  int first;           // stripe
  int range;           // stripes
  int vectors;         // that have an output
  const int* outputs;  // where each vector's output is among all; null if they are in order

  // The vector of outputs that belongs to a vector.
  __device__ __forceinline__ int output(int vector) const {
    return outputs == nullptr ? vector : outputs[vector];
  }

  __device__ __forceinline__ int tile(int local) const { return group + local * groups; }

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

// Copies the head of a tile to its place. All lanes of a warp call this.
__device__ __forceinline__ void load_head(TileHead& to, const TileHead* from) {
  const int lane = threadIdx.x % kLanes;
  if (lane < kHeadPieces) {
    reinterpret_cast<uint4*>(&to)[lane] = __ldg(reinterpret_cast<const uint4*>(from) + lane);
  }
}

// Scales the sum of a row of a tile and writes it.
__device__ __forceinline__ void write_sum(const Work& work, const Rounded& rounded,
                                          const TileHead& head, int tile, int row, int vector,
                                          int high, int low) {
  if (tile * kTileRows + row >= work.matrix.rows || vector >= work.vectors) return;
  const double total = rounded.sum[vector];
  const double sum = 256.0 * high + low + head.base * total;
  const Row& at = head.rows[row];
  const double value = (sum * at.scale + total * at.offset) * rounded.scale[vector];
  const long long begin = static_cast<long long>(work.output(vector)) * work.launch.y_stride;
  store_value(work.launch.y, begin + work.matrix.y_begin + at.index, static_cast<float>(value),
              kType);
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
      write_sum(work, state.rounded, state.heads[open], tile, row, vector, sums[0], sums[1]);
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
        write_sum(work, state.rounded, state.heads[open], tile, i % kTileRows, i / kTileRows,
                  high[turn], low[turn]);
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

// Makes a block's variables ready. The block must meet at a barrier before they are used.
__device__ __forceinline__ void begin_block(const Work& work, State& state) {
  for (int i = threadIdx.x / kLanes; i < min(work.tiles, kOpenTiles); i += kWarps) {
    load_head(state.heads[i], work.matrix.heads + work.tile(i));
  }
  for (int i = threadIdx.x; i < kOpenTiles * kTileRows * kRowVectors * 2; i += THREADS) {
    (&state.sums[0][0][0][0])[i] = 0;
  }
  if (threadIdx.x < kOpenTiles) state.done[threadIdx.x] = state.rounds[threadIdx.x] = 0;
}

// Rounds vector(0), vector(1), and so on. All warps call meanwhile() once they have requested what
// they round first. The block must meet at a barrier before digits are read.
template <class Vectors, class Meanwhile>
__device__ __forceinline__ void round_vectors(Vectors vector, const FlatDigits& out,
                                              Rounded& rounded, Meanwhile meanwhile) {
  constexpr int kThreads = THREADS / kGroups;
  const int mine = threadIdx.x / kThreads;
  round_vector<kGroups, kThreads>(vector(mine), mine, 0, out, rounded, meanwhile);
#pragma unroll 1
  for (int i = mine + kGroups; i < kBatch; i += kGroups) {
    round_vector<kGroups, kThreads>(vector(i), i, i / kGroups, out, rounded, [] {});
  }
}

// Multiplies a block's tiles, of which `ahead` has the first stripes, and writes or adds their
// sums. Digits begin with those of the block's first column; `y_tiles` counts the tiles of the
// matrices before.
__device__ __forceinline__ void multiply_tiles(const Work& work, State& state, const u8* digits,
                                               Reader& reader, Fields (&ahead)[kAhead],
                                               int y_tiles) {
  const int warp = threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const u32 digits_at = shared_address(digits) + Digits::offset<kPhases>(lane);
  for (int share = warp; share < work.tiles * work.launch.shares; share += kWarps) {
    const int local = work.launch.shares.divide(share);
    const int in_tile = share - local * work.launch.shares;
    const int begin = work.begin(in_tile);
    const int stripes = work.begin(in_tile + 1) - begin;
    const int bits = TilePlace(work.matrix, work.tile(local)).bits;
    const int open = local % kOpenTiles;
    const u32 round = local / kOpenTiles;
    const auto is_open = [&] { return *static_cast<volatile u32*>(&state.rounds[open]) == round; };
    while (!is_open()) __nanosleep(32);
    fence_block();
    Patches patches(work.matrix, state.heads[open], in_tile, work.launch.shares);
    Accumulator parts[kSums];
#pragma unroll
    for (Accumulator& part : parts) part.clear();
#pragma unroll 1
    for (int stripe = begin; stripe < begin + stripes; ++stripe) {
      const Fields now = ahead[0];
#pragma unroll
      for (int i = 1; i < kAhead; ++i) ahead[i - 1] = ahead[i];
      reader.next(ahead[kAhead - 1]);
      multiply_stripe<kMaxBits>(now, bits, digits_at + stripe * kDigitBytes, parts);
    }
    auto* out = state.sums[open];
    const int left = work.first * kStripeColumns;
    const int width = work.range * kStripeColumns;
    // Patches are sorted by column, so that those of a block's columns are neighbours.
    patches.each([&](u32 patch, bool exists) {
      const int column = patch_column(patch) - left;
      exists &= column >= 0 && column < width;
      if constexpr (kPrepared) {
        add_patches_together(patch, exists, work.launch.numbers, out);
      } else {
        if (exists) add_patch(patch, digits, out);
      }
    });
    add_sums(parts, out);
    __syncwarp();
    u32 last = 0;
    if (lane == 0) {
      fence_block();
      last = atomicAdd(&state.done[open], 1) + 1 == static_cast<u32>(work.launch.shares);
      fence_block();
    }
    if (__shfl_sync(~0u, last, 0)) {
      __syncwarp();  // shows the other lanes what lane 0's fence made visible
      finish_tile(work, state, local, y_tiles + work.tile(local));
    }
    __syncwarp();
  }
}

}  // namespace
