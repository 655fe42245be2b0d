// The direct product: convolution of a few samples with `W + s Delta`, and its gradients. task_conv.cpp says how in
// float32, task_conv_pairs.cpp in bfloat16, for processors that multiply it in pairs (`pair_kernels`).
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/params.h"
#include "cpu/simd/kernels.h"

namespace fastmtl::cpu {

template <class T>
struct ImageOf {
  T* data;
  int64_t stride[4];  // of sample, channel, row, column, in elements
  int64_t size[4];
};
using Image = ImageOf<float>;
using Image16 = ImageOf<uint16_t>;  // bfloat16

// one filter tap, seen from an output pixel
struct Filter {
  int64_t channels, kernel[2], stride[2], padding[2], dilation[2];
  bool last;  // a row of the weight runs (kh, kw, channel), else (channel, kh, kw)
  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t length() const { return channels * taps(); }
  int64_t panels() const { return (length() + kPanel - 1) / kPanel; }
};

// the rows of the product: pixels of the output, sample by sample
struct RowMap {
  const int64_t* samples;
  int64_t num_samples;
  int64_t height, width;  // of the output
  int64_t count() const { return num_samples * height * width; }
  void find(int64_t m, int64_t* sample, int64_t* h, int64_t* w) const {
    *w = m % width;
    *h = m / width % height;
    *sample = samples[m / (width * height)];
  }
};

// the weights of one task: rows of `length`, contiguous
struct Weights {
  const char* weight = nullptr;
  const char* delta = nullptr;
  float gate = 1;
  DType dtype = DType::f32;
  int64_t rows = 0, length = 0;
  void stage(const Kernels& k, int64_t row, int64_t from, int64_t floats, int64_t next, float* target) const {
    const int64_t skip = (row * length + from) * size_of(dtype);
    const int64_t there = std::max<int64_t>(std::min(floats, length - from), 0);
    k.tiles.stage[static_cast<int>(dtype)](weight ? weight + skip : nullptr, delta ? delta + skip : nullptr, gate,
                                           there, floats, row + next < rows ? next * length : 0, target);
  }
};

// y of some samples, with `bias` `[Cout]` or null.
void direct_forward(const Image& x, const Filter& f, const RowMap& map, const Weights& weights, const float* bias,
                    const Image& y);
void direct_forward(const Image16& x, const Filter& f, const RowMap& map, const Weights& weights, const float* bias,
                    const Image16& y);

// dx of some samples, which is overwritten.
void direct_input_gradient(const Image& g, const Filter& f, const RowMap& map, const Weights& weights, const Image& dx);
void direct_input_gradient(const Image16& g, const Filter& f, const RowMap& map, const Weights& weights,
                           const Image16& dx);

struct Spread {
  float* weight = nullptr;  // sum over tasks, float
  bool add = false;
  char* delta = nullptr;  // gate * gradient, in the dtype of the weights
  bool gate = false;      // whether <gradient, Delta> is wanted
};

// The weight gradient of some samples, spread as it is made; returns <gradient, Delta>, if that is wanted.
double direct_weight_gradient(const Image& x, const Image& g, const Filter& f, const RowMap& map,
                              const Weights& weights, const Spread& spread);
double direct_weight_gradient(const Image16& x, const Image16& g, const Filter& f, const RowMap& map,
                              const Weights& weights, const Spread& spread);

}  // namespace fastmtl::cpu
