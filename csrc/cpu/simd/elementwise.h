// The innermost kernels of the methods that look at the gradients element by element, once per vector level. They see
// plain pointers to one block of at most kBlock columns.
#pragma once

#include <cstdint>

namespace fastmtl::cpu {

struct Ahead;

// out[k] = the sum of the elements of one sign, drawn by number `first + k` of the SplitMix64 stream `key` (Chen et al.
// 2020). leak: `[count]`, what of the other sign passes; null: nothing.
using SignDropBlock = void (*)(const void* const* rows, int count, int64_t length, const double* leak, uint64_t key,
                               uint64_t first, void* out, const Ahead& ahead);

// out[k] = the mean of `count` rows and as many zeros as told, without the `trim` smallest and largest of them
using TrimmedMeanBlock = void (*)(const void* const* rows, int count, int zeros, int trim, int64_t length, void* out);

// average[k] = keep * average[k] + take * row[k], in float or, for f64, double; row null: zeros. An average that would
// not be finite stays as it was. Returns whether there was none; square, if not null: plus the sum of squares.
using AverageBlock = bool (*)(const void* row, int64_t length, double keep, double take, void* average, double* square);

// x = scale * row[k]; squares[k] += x * x, in float or, for f64, double; returns the sum of x * x / sqrt(squares[k]),
// where 0 / 0 is 0. An element that would not be finite leaves its square as it was, and makes the sum NaN.
using ExcessBlock = double (*)(const void* row, int64_t length, double scale, void* squares);

struct Elementwise {  // by DType of the rows
  SignDropBlock sign_drop[4];
  TrimmedMeanBlock trimmed_mean[4];
  AverageBlock average[4];
  ExcessBlock excess[4];
};

}  // namespace fastmtl::cpu
