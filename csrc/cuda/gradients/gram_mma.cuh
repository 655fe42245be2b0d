// M = G G^T on tensor cores, for many tasks. A lane takes 16 bytes of each row straight into the fragments of the
// product: G G^T sums over columns, whose order does not matter as long as it is the same for all rows, so lane
// 4 g + t takes consecutive columns of row g, and the register that is an A fragment is a B fragment as well.
//
// What a lane will take is copied into shared memory some steps ahead, where it is the lane's own: a queue of loads in
// flight without registers and without barriers.
//
// Tensor cores may cut accumulators off instead of rounding, so they sum a few columns only, from zero; the sums are
// added in float32 outside, and every so many steps in float64. float32 is split in two tf32 parts, of which three
// products are made. float64 is multiplied as such.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/gradients/finish.cuh"

// Loads of a multiprocessor under way: what its share of the bandwidth brings during some latencies of a load. Of the
// 99 KiB of shared memory that the smallest cards have, totals and pointers take up to 24.
#if !defined(FASTMTL_KIB_IN_FLIGHT)
#define FASTMTL_KIB_IN_FLIGHT 64
#endif

namespace fastmtl::cuda {

// products(from, sum): adds to this warp's tiles (i, j) of the upper triangle of M, kTall x 8 each, row by row, what
// the columns of one 16-byte load bring. from: shared memory, the lane's bytes of each 8 rows kWarp apart.
template <class In>
struct Tile {  // 16 bit
  static constexpr int kTall = 16, kValues = 4;
  static constexpr int kAdditions = 1;  // to a sum in a step
  template <int kGroups, int kTiles>
  __device__ static void products(const Raw* from, float (&sum)[kTiles][kValues]) {
    Raw v[kGroups];
#pragma unroll
    for (int q = 0; q < kGroups; ++q) v[q] = from[q * kWarp];
#pragma unroll
    for (int i = 0, tile = 0; i < kGroups / 2; ++i) {
      const Raw &up = v[2 * i], &down = v[2 * i + 1];
      const uint32_t a[2][4] = {{up.w[0], down.w[0], up.w[1], down.w[1]}, {up.w[2], down.w[2], up.w[3], down.w[3]}};
#pragma unroll
      for (int j = 2 * i; j < kGroups; ++j, ++tile) {
        float d[4];
        const uint32_t b[2][2] = {{v[j].w[0], v[j].w[1]}, {v[j].w[2], v[j].w[3]}};
        mma<false>(d, a[0], b[0], In{});
        mma<true>(d, a[1], b[1], In{});
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[tile][k] += d[k];
      }
    }
  }
};

template <>
struct Tile<float> {
  static constexpr int kTall = 16, kValues = 4;
  static constexpr int kAdditions = 2;
  template <int kGroups, int kTiles>
  __device__ static void products(const Raw* from, float (&sum)[kTiles][kValues]) {
#pragma unroll(kGroups > 2 ? 1 : 2)  // many rows have no registers for both at once
    for (int half = 0; half < 2; ++half) {
      // High and low parts of two columns. What stands on the right is not the same number as what stands on the left,
      // but for tensor cores it is: it saves the moves between the registers that the two sides want.
      uint32_t left_high[kGroups][2], left_low[kGroups][2], right_high[kGroups][2], right_low[kGroups][2];
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        const auto two = reinterpret_cast<const Vector<float, 2>*>(from + q * kWarp)[half];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          uint32_t bits;
          memcpy(&bits, &two.v[k], 4);
          left_high[q][k] = to_tf32(bits);
          right_high[q][k] = bits + 0x1000;
          float rounded;
          memcpy(&rounded, &left_high[q][k], 4);
          // NaN where there was one, whatever has become of it in the high part
          const float rest = two.v[k] - rounded;
          memcpy(&left_low[q][k], &rest, 4);
          right_low[q][k] = left_low[q][k] & kTf32;
        }
      }
#pragma unroll
      for (int i = 0, tile = 0; i < kGroups / 2; ++i) {
        const int p = 2 * i, q = 2 * i + 1;
        const uint32_t ah[4] = {left_high[p][0], left_high[q][0], left_high[p][1], left_high[q][1]};
        const uint32_t al[4] = {left_low[p][0], left_low[q][0], left_low[p][1], left_low[q][1]};
#pragma unroll
        for (int j = 2 * i; j < kGroups; ++j, ++tile) {
          float d[4];
          mma<false>(d, al, right_high[j], 0.0f);
          mma<true>(d, ah, right_low[j], 0.0f);
          mma<true>(d, ah, right_high[j], 0.0f);
#pragma unroll
          for (int k = 0; k < 4; ++k) sum[tile][k] += d[k];
        }
      }
    }
  }
};

template <>
struct Tile<double> {
  static constexpr int kTall = 8, kValues = 2;
  static constexpr int kAdditions = 0;  // in float32
  template <int kGroups, int kTiles>
  __device__ static void products(const Raw* from, double (&sum)[kTiles][kValues]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      double x[kGroups];
#pragma unroll
      for (int q = 0; q < kGroups; ++q) x[q] = reinterpret_cast<const double*>(from + q * kWarp)[k];
#pragma unroll
      for (int i = 0, tile = 0; i < kGroups; ++i)
#pragma unroll
        for (int j = i; j < kGroups; ++j, ++tile) mma(sum[tile], x[i], x[j]);
    }
  }
};

// kGroups groups of 8 rows. Up to 64 tasks a block takes all of them; beyond, two of the bands of 32 rows.
template <class In, int kGroups>
struct MmaShape {
  using Acc = typename Accumulator<In>::type;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(In));
  static constexpr int kColumns = 4 * kVector;                             // of a warp's step
  static constexpr int kStep = kWarps * kColumns;                          // of the block's
  static constexpr int kBlocks = kGroups == 2 ? 3 : kGroups == 4 ? 2 : 1;  // of a multiprocessor
  static constexpr int kStages = std::max(FASTMTL_KIB_IN_FLIGHT / kBlocks / (kGroups * 4), 2);
  static constexpr int kTall = Tile<In>::kTall, kValues = Tile<In>::kValues;
  static constexpr int kPerRow = kTall / 8;  // groups of rows in a tile
  static constexpr int kTileRows = kGroups / kPerRow;
  static constexpr int length_of(int tile_row) { return kGroups - tile_row * kPerRow; }
  static constexpr int tiles() {
    int count = 0;
    for (int i = 0; i < kTileRows; ++i) count += length_of(i);
    return count;
  }
  static constexpr int kTiles = tiles();
  static constexpr int kPairs = kValues / 2;  // of neighbours in a row of M: what a lane holds of a tile
  // A float32 sum has 96 additions at most: where all products are equal each of them errs the same way, by up to half
  // a unit, which no later sum averages out.
  static constexpr int kStepsOfSum = Tile<In>::kAdditions == 0 ? 1 << 30 : 96 / std::max(Tile<In>::kAdditions, 1);

  struct Shared {
    union {
      struct {
        Raw queue[kStages][kWarps][kGroups][kWarp];
        Vector<double, 2> total[kTiles][kPairs][kWarp];
        Batch<kGroups * 8, 0> batch;
      };
      SolverMemory<kGroups == 2 ? 16 : kMaxTasks> solver;
    };
    int flag;
  };
  // what the smallest cards leave a block, a KiB of each of a multiprocessor's being the system's; with more in flight,
  // the largest
  static_assert(kBlocks * (sizeof(Shared) + 1024) <= (FASTMTL_KIB_IN_FLIGHT <= 64 ? 100 : 228) * 1024);
};

constexpr int kBand = 32;

// which rows of G a block reads: its rows 0 ... are tasks first ..., its rows kBand ... are tasks second ...
struct Bands {
  int first, second;
  bool whole;  // one block has all tasks
  int count;
};

__device__ inline Bands bands_of(int T, int pair) {
  Bands b{0, kBand, T <= 2 * kBand, (T + kBand - 1) / kBand};
  if (b.whole) return b;
  int i = 0;
  while (pair >= b.count - 1 - i) pair -= b.count - 1 - i++;
  b.first = i * kBand;
  b.second = (i + 1 + pair) * kBand;
  return b;
}

// every block of M by one owner: a band with itself by the pair that follows it, the last one by the last pair
__device__ inline bool owns(const Bands& b, int row, int column) {
  const int i = row / kBand, j = column / kBand;
  if (b.whole || i != j) return true;
  const int low = b.first / kBand, high = b.second / kBand;
  return high == low + 1 && (i == low || high == b.count - 1);
}

// The lane's columns at ... of each 8 rows, element by element, as many as there are before `end`, to where they would
// have been copied. row, stride: of the lane's first row, in shared memory.
template <class In, int kGroups>
__device__ inline void load_narrow(const void* const* row, const int64_t* stride, int64_t at, int64_t end, Raw* to) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(In));
#pragma unroll 2
  for (int q = 0; q < kGroups; ++q) {
    Vector<In, kVector> v{};
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      if (row[q * 8] != nullptr && at + k < end)
        v.v[k] = in_global(static_cast<const In*>(row[q * 8]))[(at + k) * stride[q * 8]];
    memcpy(to + q * kWarp, &v, 16);
  }
}

// Adds the sums of all warps to the block's totals, and starts them anew. In each round every warp adds another few of
// its tiles, so that each total gets the warps' sums in a fixed order.
template <class Shape>
__device__ inline void add_to_totals(typename Shape::Acc (&acc)[Shape::kTiles][Shape::kValues],
                                     typename Shape::Shared& shared) {
  constexpr int kShare = (Shape::kTiles + kWarps - 1) / kWarps;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int round = 0; round < kWarps; ++round) {
    __syncthreads();
    const int mine = (warp + round) % kWarps;
#pragma unroll
    for (int share = 0; share * kShare < Shape::kTiles; ++share) {
      if (share != mine) continue;
#pragma unroll
      for (int tile = share * kShare; tile < (share + 1) * kShare && tile < Shape::kTiles; ++tile)
#pragma unroll
        for (int pair = 0; pair < Shape::kPairs; ++pair) {
          Vector<double, 2>& total = shared.total[tile][pair][lane];
          Vector<double, 2> sum = total;
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            sum.v[k] += static_cast<double>(acc[tile][2 * pair + k]);
            acc[tile][2 * pair + k] = 0;
          }
          total = sum;
        }
    }
  }
}

// Leaves the partial sums of the counted columns [low, high), or of two bands of them (`pair`), in the row that
// partial_of() says, which is asked last.
template <class In, int kGroups, class PartialOf>
__device__ inline void leave_sums(const Grads& grads, int64_t low, int64_t high, int pair, const PartialOf& partial_of,
                                  typename MmaShape<In, kGroups>::Shared& shared) {
  using Shape = MmaShape<In, kGroups>;
  const int tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  const int T = grads.num_tasks;
  const Bands bands = bands_of(T, pair);
  auto task_of = [&](int row) { return (row < kBand ? bands.first : bands.second) + row % kBand; };
  typename Shape::Acc acc[Shape::kTiles][Shape::kValues] = {};
  constexpr int kHeld = Shape::kTiles * Shape::kPairs * kWarp;
  for (int e = tid; e < kHeld; e += kThreads) (&shared.total[0][0][0])[e] = {};
  int steps = 0;  // since the totals were added to

  for_each_segment(grads, low, high, 0, task_of, shared.batch, [&](int s) {
    const Segment segment = shared.batch.segment[s];
    // volatile: fetched for every step, since there is no register to keep them in
    const void* const volatile* const rows = shared.batch.row[s] + lane / 4;
    constexpr int kStage = kWarps * kGroups * kWarp;
    Raw* const queue = &shared.queue[0][warp][0][lane];
    // from the segment's first column on; warps take whole steps of what comes before `whole` from their queues
    const int length = static_cast<int>(segment.end - segment.begin);
    const int whole = segment.aligned16 ? length / Shape::kColumns * Shape::kColumns : 0;
    const int64_t mine = segment.begin + lane % 4 * Shape::kVector;
    auto copy = [&](int at, int stage) {
      if (at < whole) {
        // all of them first: the compiler takes no load past a copy
        const In* row[kGroups];
#pragma unroll
        for (int q = 0; q < kGroups; ++q) row[q] = static_cast<const In*>(rows[q * 8]);
#pragma unroll
        for (int q = 0; q < kGroups; ++q)
          if (row[q] != nullptr) copy_async(queue + stage * kStage + q * kWarp, row[q] + mine + at);
      }
      commit_copies();
    };
#pragma unroll 1
    for (int k = 0; k < Shape::kStages; ++k) {
#pragma unroll
      for (int q = 0; q < kGroups; ++q)
        if (rows[q * 8] == nullptr) queue[k * kStage + q * kWarp] = Raw{};
      copy(warp * Shape::kColumns + k * Shape::kStep, k);
    }
    int stage = 0;
    for (int base = 0; base < length; base += Shape::kStep) {
      if (steps == Shape::kStepsOfSum) {
        add_to_totals<Shape>(acc, shared);
        steps = 0;
      }
      ++steps;
      const int at = base + warp * Shape::kColumns;
      if (at >= length) continue;
      Raw* const from = queue + stage * kStage;
      if (at < whole) wait_for_copies<Shape::kStages - 1>();
      else
        load_narrow<In, kGroups>(shared.batch.row[s] + lane / 4, shared.batch.stride[s] + lane / 4, mine + at,
                                 segment.end, from);
      Tile<In>::template products<kGroups>(from, acc);
      // to where the bytes just taken lay
      copy(at + Shape::kStages * Shape::kStep, stage);
      stage = stage + 1 < Shape::kStages ? stage + 1 : 0;
    }
  });
  add_to_totals<Shape>(acc, shared);
  __syncthreads();

  double* partial = partial_of();
  for (int e = tid; e < kHeld; e += kThreads) {
    const int from = e % kWarp, pair = e / kWarp % Shape::kPairs;
    int i = 0, j = e / (kWarp * Shape::kPairs);
    while (j >= Shape::length_of(i)) j -= Shape::length_of(i++);
    const int r = task_of(i * Shape::kTall + pair * 8 + from / 4);
    const int c = task_of((i * Shape::kPerRow + j) * 8 + from % 4 * 2);
    const Vector<double, 2> total = (&shared.total[0][0][0])[e];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (r <= c + k && c + k < T && owns(bands, r, c + k)) partial[entry_of(T, r, c + k)] = total.v[k];
  }
}

template <class In, int kGroups>
__global__ void __launch_bounds__(kThreads, MmaShape<In, kGroups>::kBlocks)
    gram_mma_kernel(const __grid_constant__ GramParams p) {
  using Shared = typename MmaShape<In, kGroups>::Shared;
  FASTMTL_BIG_SHARED(Shared, shared);
  int block = static_cast<int>(blockIdx.x), slot = kNoSlot;
  if constexpr (kGroups > 2) {
    block -= drawing_blocks(p);
    if (block < 0) draw_apart(p, shared.solver);
  }
  if (block >= 0) {
    const int slot_here = block / p.blocks_per_slot;
    const int64_t low = slot_here * p.columns_per_slot;
    slot = p.first_slot + slot_here;
    leave_sums<In, kGroups>(
        p.grads, low, low + p.columns_per_slot, block % p.blocks_per_slot,
        [&] { return p.partial + static_cast<int64_t>(slot) * num_entries(p.grads.num_tasks); }, shared);
  }
  if constexpr (kGroups == 8) {
    if (p.grads.num_tasks > 64) {
      finish<128>(p, slot, shared.flag, shared.solver);
      return;
    }
  }
  constexpr int kTasks = kGroups == 2 ? 16 : kGroups == 4 ? 32 : 64;
  finish<kTasks>(p, slot, shared.flag, shared.solver);
}

}  // namespace fastmtl::cuda
