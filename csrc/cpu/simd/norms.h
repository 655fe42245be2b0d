// The innermost kernels of batch norm, once per vector level. They see plain pointers: a run is `length` <= kBlock
// elements of one channel side by side; rows are pixels, of which `columns` <= kNormColumns channels lie side by side.
#pragma once

#include <cstdint>

namespace fastmtl::cpu {

constexpr int64_t kNormColumns = 256;

// S: float, or double for f64; tables of channels are of S

// the mean of a run, and the sum of the squares of what differs from it
using RunMoments = void (*)(const void* x, int64_t length, double* mean, double* square);
// scale = weight / sqrt(var + eps) of `length` channels; weight null: ones
using Scales = void (*)(const void* weight, const void* var, double eps, int64_t length, void* scale);
// y = (x - mean) * scale + shift
using RunAffine = void (*)(const void* x, int64_t length, double mean, double scale, double shift, void* y);
// the same of `channels` runs of any number of pixels, one behind the other; tables of channels
using ChannelsAffine = void (*)(const void* x, int64_t channels, int64_t pixels, const void* mean, const void* scale,
                                const void* shift, void* y);
// the same of any number of pixels, one behind the other, of any number of channels
using PixelsAffine = void (*)(const void* x, int64_t pixels, int64_t channels, const void* mean, const void* scale,
                              const void* shift, void* y);
// adds the sums of g and of g * (x - mean)
using RunProducts = void (*)(const void* g, const void* x, int64_t length, double mean, double* sum, double* product);
// out = g * of_g + (x - mean) * of_x + constant
using RunGradient = void (*)(const void* g, const void* x, int64_t length, double mean, double of_g, double of_x,
                             double constant, void* out);

// the same of `count` rows, whose channels begin `from` elements behind each pointer; sums are of these rows alone
using RowsMoments = void (*)(const void* const* rows, int count, int64_t from, int64_t columns, double* mean,
                             double* square);
using RowsAffine = void (*)(const void* const* rows, int count, int64_t from, int64_t columns, const void* mean,
                            const void* scale, const void* shift, void* const* y);
using RowsProducts = void (*)(const void* const* g, const void* const* rows, int count, int64_t from, int64_t columns,
                              const void* mean, double* sum, double* product);
using RowsGradient = void (*)(const void* const* g, const void* const* rows, int count, int64_t from, int64_t columns,
                              const void* mean, const void* of_g, const void* of_x, const void* constant,
                              void* const* out);

// group norm, of `channels` runs of `pixels`, one behind the other, with one mean: adds each channel's sums of g and of
// g * (x - mean); in float (double for f64) within kBlock pixels
using ChannelsProducts = void (*)(const void* g, const void* x, int64_t channels, int64_t pixels, double mean,
                                  double* sum, double* product);
// out = (g * weight - centre) * scale + (x - mean) * of_x; weight by channel, null: ones
using ChannelsGradient = void (*)(const void* g, const void* x, int64_t channels, int64_t pixels, double mean,
                                  const void* weight, double centre, double scale, double of_x, void* out);
// layer norm of one row, y = (x - mean) * scale * weight + bias: adds g * (x - mean) * scale and g to the sums of
// weight and bias, tables of S, and writes the gradient of x; null: not wanted, or no weight
using RowGradient = void (*)(const void* g, const void* x, int64_t length, double mean, double scale,
                             const void* weight, void* of_weight, void* of_bias, void* out);

struct Norms {  // by DType of x
  RunMoments run_moments[4];
  RunAffine run_affine[4];
  RunProducts run_products[4];
  RunGradient run_gradient[4];
  RowsMoments rows_moments[4];
  RowsAffine rows_affine[4];
  RowsProducts rows_products[4];
  RowsGradient rows_gradient[4];
  Scales scales[4];
  ChannelsAffine channels_affine[4];
  PixelsAffine pixels_affine[4];
  ChannelsProducts channels_products[4];
  ChannelsGradient channels_gradient[4];
  RowGradient row_gradient[4];
};

}  // namespace fastmtl::cpu
