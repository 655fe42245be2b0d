// Products of a warp from operands in shared memory, and how they lie there.
//
// *By depth*: a row of the operand has 64 bytes, which are 32 or 16 numbers along the depth of the product. Two rows
// fill the 32 banks, so the four units of 16 bytes are exchanged by (row / 2) % 4: any eight rows that are read at
// once, at one unit of depth, lie in different banks.
// *Across*: for weight gradients, whose depth are the rows of pictures: a line holds one number of depth for all rows
// of the operand. Units are exchanged by line % 8 (16 bits, read by transposing loads of eight lines) or by
// 2 (line % 4) (float32, read one by one: four lines of eight numbers at once).
#pragma once

#include "cuda/device.cuh"

namespace fastmtl::cuda {

constexpr int kUnit = 16;        // bytes
constexpr int kDepthBytes = 64;  // of a row, by depth
// float32 sums of tensor cores, which cut digits off, are added to a total after so many steps of a main loop
constexpr int kStepsOfSum = 8;

// Three products of tf32: of upper and lower parts, without the product of the lower ones.
struct Split {
  uint32_t upper, lower;
  __device__ explicit Split(uint32_t bits) : upper(to_tf32(bits)) {
    float x, y;
    memcpy(&x, &bits, 4);
    memcpy(&y, &upper, 4);
    const float rest = x - y;
    memcpy(&lower, &rest, 4);
  }
};

// kRows x kColumns numbers of a warp: sums[m][n] are 16 x 8 of them, as mma.m16n8k16 and .m16n8k8 leave them
template <class In, int kRows, int kColumns>
struct WarpTile {
  static constexpr int kM = kRows / 16, kN = kColumns / 8;
  static_assert(kM * 16 == kRows && kN * 8 == kColumns && kN % 2 == 0);
  float sum[kM][kN][4];

  __device__ void fill(float x) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[m][n][k] = x;
  }

  __device__ void add_and_clear(WarpTile& from) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          sum[m][n][k] += from.sum[m][n][k];
          from.sum[m][n][k] = 0.0f;
        }
  }

  // of the registers of a: 16 rows each; of b: 8 columns each
  __device__ void add_product(const uint32_t (&a)[kM][4], const uint32_t (&b)[kN][2]) {
    if constexpr (sizeof(In) == 4) {
      uint32_t upper[kN][2], lower[kN][2];
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const Split split(b[n][k]);
          upper[n][k] = split.upper;
          lower[n][k] = split.lower;
        }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const Split split(a[m][k]);
          high[k] = split.upper;
          low[k] = split.lower;
        }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          mma<true>(sum[m][n], low, upper[n], In{});
          mma<true>(sum[m][n], high, lower[n], In{});
          mma<true>(sum[m][n], high, upper[n], In{});
        }
      }
    } else {
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kN; ++n) mma<true>(sum[m][n], a[m], b[n], In{});
    }
  }
};

// --- by depth

// where unit `unit` of a row lies, from the operand's beginning
__device__ inline int place_by_depth(int row, int unit) { return row * kDepthBytes + (unit ^ (row / 2 % 4)) * kUnit; }

// half: which 32 bytes of depth. a, b: the warp's first row of each operand
template <class In, int kRows, int kColumns>
__device__ inline void add_by_depth(WarpTile<In, kRows, kColumns>& tile, const unsigned char* a, const unsigned char* b,
                                    int half) {
  using Tile = WarpTile<In, kRows, kColumns>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t left[Tile::kM][4], right[Tile::kN][2];
  // lanes 0 to 7 name the rows of the first matrix of 8 x 16 bytes, and so on
  const unsigned char* from = a + place_by_depth(lane % 16, 2 * half + lane / 16);
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) load_matrices(left[m], from + m * 16 * kDepthBytes);
  from = b + place_by_depth(lane / 16 * 8 + lane % 8, 2 * half + lane / 8 % 2);
#pragma unroll
  for (int n = 0; n < Tile::kN; n += 2) {
    uint32_t both[4];
    load_matrices(both, from + n * 8 * kDepthBytes);
    right[n][0] = both[0];
    right[n][1] = both[1];
    right[n + 1][0] = both[2];
    right[n + 1][1] = both[3];
  }
  tile.add_product(left, right);
}

// --- across

// where unit `unit` of a line lies; kUnits: of a line
template <class In, int kUnits>
__device__ inline int place_across(int line, int unit) {
  const int exchanged = sizeof(In) == 4 ? 2 * (line % 4) : line % 8;
  return (line * kUnits + (unit ^ exchanged)) * kUnit;
}

// part: which 16 (8) lines; a, b: the operands, of kAUnits and kBUnits units a line; row, column: the warp's first
template <class In, int kAUnits, int kBUnits, int kRows, int kColumns>
__device__ inline void add_across(WarpTile<In, kRows, kColumns>& tile, const unsigned char* a, const unsigned char* b,
                                  int row, int column, int part) {
  using Tile = WarpTile<In, kRows, kColumns>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t left[Tile::kM][4], right[Tile::kN][2];
  if constexpr (sizeof(In) == 4) {
    const int g = lane / 4, line = part * 8 + lane % 4;
    auto number = [&](const unsigned char* from, auto units, int at_line, int at) {
      uint32_t x;
      memcpy(&x, from + place_across<In, decltype(units)::value>(at_line, at / 4) + at % 4 * 4, 4);
      return x;
    };
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        left[m][k] = number(a, std::integral_constant<int, kAUnits>{}, line + k / 2 * 4, row + m * 16 + k % 2 * 8 + g);
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        right[n][k] = number(b, std::integral_constant<int, kBUnits>{}, line + k * 4, column + n * 8 + g);
  } else {
    int line = part * 16 + lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m)
      load_transposed(left[m], a + place_across<In, kAUnits>(line, row / 8 + m * 2 + lane / 8 % 2));
    line = part * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int n = 0; n < Tile::kN; n += 2) {
      uint32_t both[4];
      load_transposed(both, b + place_across<In, kBUnits>(line, column / 8 + n + lane / 16));
      right[n][0] = both[0];
      right[n][1] = both[1];
      right[n + 1][0] = both[2];
      right[n + 1][1] = both[3];
    }
  }
  tile.add_product(left, right);
}

}  // namespace fastmtl::cuda
