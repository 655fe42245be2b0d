// The innermost CPU kernels, once per vector level, chosen at run time. They see plain pointers to one block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/rows.h"
#include "cpu/simd/elementwise.h"
#include "cpu/simd/low_rank.h"
#include "cpu/simd/norms.h"
#include "cpu/simd/pairs.h"
#include "cpu/simd/sums.h"
#include "cpu/simd/tiles.h"

namespace fastmtl::cpu {

// columns in a block: with float32, 8 tasks of it lie in L1, 128 in L2
constexpr int64_t kBlock = 1024;

// the same rows' next block, fetched while this one is worked on; count 0: nothing to fetch
struct Ahead {
  const char* const* rows = nullptr;
  int count = 0;
  int64_t bytes = 0;
};

// adds <row_i, row_j> for i <= j to total[task[i] * stride + task[j]]; float products are summed in float within
// the block. rows: `count` pointers to `length` <= kBlock elements.
using GramBlock = void (*)(const void* const* rows, int count, int64_t length, const int* task, double* total,
                           int stride, const Ahead& ahead);

// out[k] = sum_i weights[k * count + i] * row_i, accumulated in at least float; `stream`: past the cache
using CombineBlock = void (*)(const void* weights, int num_out, const void* const* rows, int count, int64_t length,
                              void* const* out, bool stream, const Ahead& ahead);

using WidenBlock = void (*)(const void* source, float* target, int64_t length);

// of bf16 by dot products of pairs, which take subnormals for zero
struct PairKernels {
  GramBlock gram;
  PairTiles tiles;
};

struct Kernels {
  const char* name;
  GramBlock gram[4];         // by DType
  CombineBlock combine[4];   // weights are float, double for f64
  const PairKernels* pairs;  // null: none
  WidenBlock widen[4];       // bf16 and f16 to float
  Tiles tiles;
  Elementwise elementwise;
  Norms norms;
  LowRank low_rank;
  SumKernels sums;
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

std::vector<std::string> compiled_levels();
std::vector<std::string> available_levels();
const Kernels& kernels();
const PairKernels* pair_kernels();  // of these kernels, or null where the processor has no such products
void set_level(const std::string& name);

}  // namespace fastmtl::cpu
