// The innermost kernels of the products with `W + s Delta`, once per vector level. Rows are cut into panels of kPanel
// floats, padded with zeros; what they see is plain pointers.
#pragma once

#include <cstdint>

namespace fastmtl::cpu {

constexpr int64_t kPanel = 64;  // floats of a row in one panel: four AVX-512 vectors
constexpr int kTall = 6;        // rows whose products with a panel stay in registers

// row[k] = w[k] + gate * d[k] for k < length, then zeros up to `padded`; w null: zero, d null: nothing added. What
// lies `ahead` elements further is fetched (0: nothing is): rows are far apart, and the hardware would come late.
using StageRow = void (*)(const void* w, const void* d, float gate, int64_t length, int64_t padded, int64_t ahead,
                          float* row);

// out[m * out_stride + n] += <a_m, w_n> over `panels`; a: [panels][a_rows][kPanel], w: rows `w_stride` apart
using DotRows = void (*)(const float* w, int64_t w_stride, int num_w, const float* a, int64_t a_rows, int64_t num_a,
                         int64_t panels, float* out, int64_t out_stride);

// da[m][k] += sum_n g[n][m] * w[n * w_stride + k] for one panel; g: [num_n][kTall]
using BackRows = void (*)(const float* w, int64_t w_stride, int64_t num_n, const float* g, int num_m, float* da);

// e[n][k] = sum_m g[m][n] * a[m][k] for one panel; g: [num_m][kTall]
using OuterRows = void (*)(const float* a, int64_t num_m, const float* g, int num_n, float* e);

// one row of a weight gradient e: dw[k] = e[k] (or += with `add`), dd[k] = gate * e[k]; returns <e, d>. Null: left out
using SpreadRow = double (*)(const float* e, int64_t length, float gate, const void* d, float* dw, bool add, void* dd);

struct Tiles {
  StageRow stage[4];  // by DType of the weights; none for f64
  DotRows dot;
  BackRows back;
  OuterRows outer;
  SpreadRow spread[4];
};

}  // namespace fastmtl::cpu
