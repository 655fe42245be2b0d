// M = G G^T on tensor cores, for many tasks. A warp reads 16 bytes of each row per lane straight into the fragments of
// the product: G G^T sums over columns, whose order does not matter as long as it is the same for all rows, so lane
// 4 g + t takes consecutive columns of row g, and the register that is an A fragment is a B fragment as well.
//
// Tensor cores may cut accumulators off instead of rounding, so they sum a few columns only, from zero; the sums are
// added in float32 outside. float32 is split in two tf32 parts, of which three products are made. float64 is exact.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "finish.cuh"

namespace fastmtl::cuda {

__device__ inline void add_values(float (&sum)[4], const float (&d)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) sum[k] += d[k];
}

// Where there are many tiles, two warps share the columns and take half of the rows of tiles each, which leaves room
// for two blocks to a multiprocessor. Rows 0, 3, 4, 7 and 1, 2, 5, 6 are equally long together.
__host__ __device__ constexpr bool is_mine(int halves, int half, int i) {
  return halves == 1 || (i % 4 == 0 || i % 4 == 3) == (half == 0);
}

// the 16 bytes of a load, as they came: taken apart, they would have to arrive before the next load is issued
struct alignas(16) Raw {
  uint32_t w[4];
};

// products<groups, halves, half>(v, add): this half's tiles (i, j) of the upper triangle of M, kTall x 8 each, over the
// columns of one 16-byte load. add(tile, add_to) lets add_to add its product to the sums of the half's next tile.
template <class In>
struct Tile {  // 16 bit
  static constexpr int kTall = 16, kValues = 4;
  template <int kGroups, int kHalves, int kHalf, class Add>
  __device__ static void products(const Raw (&v)[kGroups], const Add& add) {
    uint32_t part[kGroups][4];
#pragma unroll
    for (int q = 0; q < kGroups; ++q) memcpy(part[q], &v[q], 16);
#pragma unroll
    for (int i = 0, tile = 0; i < kGroups / 2; ++i) {
      if (!is_mine(kHalves, kHalf, i)) continue;
      const uint32_t a[2][4] = {{part[2 * i][0], part[2 * i + 1][0], part[2 * i][1], part[2 * i + 1][1]},
                                {part[2 * i][2], part[2 * i + 1][2], part[2 * i][3], part[2 * i + 1][3]}};
#pragma unroll
      for (int j = 2 * i; j < kGroups; ++j) {
        float d[4];
        const uint32_t b[2][2] = {{part[j][0], part[j][1]}, {part[j][2], part[j][3]}};
        mma<false>(d, a[0], b[0], In{});
        mma<true>(d, a[1], b[1], In{});
        add(tile++, [&](float (&sum)[4]) { add_values(sum, d); });
      }
    }
  }
};

template <>
struct Tile<float> {
  static constexpr int kTall = 16, kValues = 4;
  template <int kGroups, int kHalves, int kHalf, class Add>
  __device__ static void products(const Raw (&v)[kGroups], const Add& add) {
#pragma unroll
    for (int s = 0; s < 4; s += 2) {
      uint32_t high[kGroups][2], low[kGroups][2];
#pragma unroll
      for (int q = 0; q < kGroups; ++q)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float x;
          memcpy(&x, &v[q].w[s + k], 4);
          float rounded;
          high[q][k] = to_tf32(x);
          memcpy(&rounded, &high[q][k], 4);
          low[q][k] = to_tf32(x - rounded);
        }
#pragma unroll
      for (int i = 0, tile = 0; i < kGroups / 2; ++i) {
        if (!is_mine(kHalves, kHalf, i)) continue;
        const uint32_t ah[4] = {high[2 * i][0], high[2 * i + 1][0], high[2 * i][1], high[2 * i + 1][1]};
        const uint32_t al[4] = {low[2 * i][0], low[2 * i + 1][0], low[2 * i][1], low[2 * i + 1][1]};
#pragma unroll
        for (int j = 2 * i; j < kGroups; ++j) {
          float d[4];
          mma<false>(d, al, high[j], 0.0f);
          mma<true>(d, ah, low[j], 0.0f);
          mma<true>(d, ah, high[j], 0.0f);
          add(tile++, [&](float (&sum)[4]) { add_values(sum, d); });
        }
      }
    }
  }
};

template <>
struct Tile<double> {
  static constexpr int kTall = 8, kValues = 2;
  template <int kGroups, int kHalves, int kHalf, class Add>
  __device__ static void products(const Raw (&v)[kGroups], const Add& add) {
#pragma unroll
    for (int i = 0, tile = 0; i < kGroups; ++i) {
      if (!is_mine(kHalves, kHalf, i)) continue;
#pragma unroll
      for (int j = i; j < kGroups; ++j)
        add(tile++, [&](double (&sum)[2]) {
          double x[2], y[2];
          memcpy(x, &v[i], 16);
          memcpy(y, &v[j], 16);
          mma(sum, x[0], y[0]);
          mma(sum, x[1], y[1]);
        });
    }
  }
};

// kGroups groups of 8 rows. Up to 64 tasks a block takes all of them; beyond, two of the bands of 32 rows.
template <class In, int kGroups>
struct MmaShape {
  using Acc = typename Accumulator<In>::type;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(In));
  static constexpr int kColumns = 4 * kVector;  // of a warp's step
  static constexpr int kTall = Tile<In>::kTall, kValues = Tile<In>::kValues;
  static constexpr int kPerRow = kTall / 8;  // groups of rows in a tile
  static constexpr int kTileRows = kGroups / kPerRow;
  static constexpr int kHalves = kGroups > 4 ? 2 : 1;
  static constexpr int kTeams = kWarps / kHalves;  // warps that walk the columns side by side
  // 16-bit rows of up to 32 tasks leave room for two blocks to a multiprocessor, which hide the loads as well
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  // where 64 tasks spill with it
  static constexpr bool kAhead = (sizeof(In) > 2 || kGroups > 4) && kGroups < 8;
#else
  static constexpr bool kAhead = sizeof(In) > 2 || kGroups > 4;
#endif
  static constexpr int tiles_of(int half) {
    int count = 0;
    for (int i = 0; i < kTileRows; ++i) count += is_mine(kHalves, half, i) ? kGroups - i * kPerRow : 0;
    return count;
  }
  static constexpr int kTiles = std::max(tiles_of(0), tiles_of(kHalves - 1));
  static constexpr int kTileSize = kTall * 8;
  static constexpr int kRound = 4;  // tiles that the warps add up at a time

  struct Shared {
    union {
      struct {
        Batch<kGroups * 8, 0> batch;
        Acc sums[kWarps][kRound][kTileSize];
      };
      SolverMemory<kGroups == 2 ? 16 : kMaxTasks> solver;
    };
    int flag;
  };
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

template <class In, int kGroups>
__global__ void __launch_bounds__(kThreads, kGroups == 2 ? 3 : 1)
    gram_mma_kernel(const __grid_constant__ GramParams p) {
  using Shape = MmaShape<In, kGroups>;
  using Acc = typename Shape::Acc;
  FASTMTL_SHARED(typename Shape::Shared, shared);
  const int tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  const int half = warp % Shape::kHalves, team = warp / Shape::kHalves;
  const int T = p.grads.num_tasks;
  const int slot_here = static_cast<int>(blockIdx.x) / p.blocks_per_slot;
  const Bands bands = bands_of(T, static_cast<int>(blockIdx.x) % p.blocks_per_slot);
  auto task_of = [&](int row) { return (row < kBand ? bands.first : bands.second) + row % kBand; };
  Acc acc[Shape::kTiles][Shape::kValues] = {};

  const int64_t low = slot_here * p.columns_per_slot;
  for_each_segment(p.grads, low, low + p.columns_per_slot, 0, task_of, shared.batch, [&](int s) {
    const Segment segment = shared.batch.segment[s];
    // volatile: fetched for every step, since there is no register to keep them in
    const void* const volatile* rows = shared.batch.row[s] + lane / 4;
    auto load = [&](int64_t at, Raw(&v)[kGroups]) {
      const int64_t mine = at + lane % 4 * Shape::kVector;
      if (segment.wide && at + Shape::kColumns <= segment.end) {
#pragma unroll
        for (int q = 0; q < kGroups; ++q) {
          const auto* row = static_cast<const In*>(rows[q * 8]);
          v[q] = row != nullptr ? *reinterpret_cast<const Raw*>(in_global(row + mine)) : Raw{};
        }
        return;
      }
#pragma unroll
      for (int q = 0; q < kGroups; ++q) {
        const auto* row = static_cast<const In*>(rows[q * 8]);
        const int64_t stride = shared.batch.stride[s][q * 8 + lane / 4];
        v[q] = Raw{};
#pragma unroll
        for (int k = 0; k < Shape::kVector; ++k) {
          In x{};
          if (row != nullptr && mine + k < segment.end) x = in_global(row)[(mine + k) * stride];
          if constexpr (sizeof(In) == 2) {
            uint16_t bits;
            memcpy(&bits, &x, 2);
            v[q].w[k / 2] |= static_cast<uint32_t>(bits) << (k % 2 * 16);
          } else {
            memcpy(&v[q].w[k * sizeof(In) / 4], &x, sizeof(In));
          }
        }
      }
    };
    auto walk = [&](auto half_of) {
      constexpr int kHalf = decltype(half_of)::value;
      const auto add = [&](int tile, const auto& add_to) { add_to(acc[tile]); };
      constexpr int64_t kStep = Shape::kTeams * Shape::kColumns;
      int64_t at = segment.begin + team * Shape::kColumns;
      Raw v[kGroups];
      if (Shape::kAhead && at < segment.end) load(at, v);
      for (; at < segment.end; at += kStep) {
        if constexpr (Shape::kAhead) {
          // the next step's loads are on their way while this one's products are made
          Raw next[kGroups];
          if (at + kStep < segment.end) load(at + kStep, next);
          Tile<In>::template products<kGroups, Shape::kHalves, kHalf>(v, add);
#pragma unroll
          for (int q = 0; q < kGroups; ++q) v[q] = next[q];
        } else {
          load(at, v);
          Tile<In>::template products<kGroups, Shape::kHalves, kHalf>(v, add);
        }
      }
    };
    if (half == 0) walk(std::integral_constant<int, 0>{});
    else if constexpr (Shape::kHalves == 2) walk(std::integral_constant<int, 1>{});
  });

  // the teams' tiles, a few at a time
  const int slot = p.first_slot + slot_here;
  double* partial = p.partial + static_cast<int64_t>(slot) * num_entries(T);
#pragma unroll
  for (int first = 0; first < Shape::kTiles; first += Shape::kRound) {
#pragma unroll
    for (int u = 0; u < Shape::kRound; ++u) {
      if (first + u >= Shape::kTiles) continue;
#pragma unroll
      for (int k = 0; k < Shape::kValues; ++k) {
        const int row = lane / 4 + k / 2 * 8, column = lane % 4 * 2 + k % 2;
        shared.sums[warp][u][row * 8 + column] = acc[first + u][k];
      }
    }
    __syncthreads();
    for (int e = tid; e < Shape::kHalves * Shape::kRound * Shape::kTileSize; e += kThreads) {
      const int cell = e % Shape::kTileSize, u = e / Shape::kTileSize % Shape::kRound;
      const int of = e / (Shape::kTileSize * Shape::kRound);  // the half
      double sum = 0.0;
      for (int k = 0; k < Shape::kTeams; ++k) sum += static_cast<double>(shared.sums[k * Shape::kHalves + of][u][cell]);
      int i = 0, rest = first + u;
      for (; i < Shape::kTileRows; ++i) {
        const int length = is_mine(Shape::kHalves, of, i) ? kGroups - i * Shape::kPerRow : 0;
        if (rest < length) break;
        rest -= length;
      }
      if (i == Shape::kTileRows) continue;  // this half has fewer
      const int r = task_of(i * Shape::kTall + cell / 8), c = task_of((i * Shape::kPerRow + rest) * 8 + cell % 8);
      if (r <= c && c < T && owns(bands, r, c)) partial[entry_of(T, r, c)] = sum;
    }
    __syncthreads();
  }
  if constexpr (kGroups == 8) {
    if (T > 64) {
      finish<128>(p, slot, shared.flag, shared.solver);
      return;
    }
  }
  constexpr int kTasks = kGroups == 2 ? 16 : kGroups == 4 ? 32 : 64;
  finish<kTasks>(p, slot, shared.flag, shared.solver);
}

}  // namespace fastmtl::cuda
