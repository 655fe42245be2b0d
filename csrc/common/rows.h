// From torch's tensors to T gradient rows of n parameters.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "common/params.h"

namespace fastmtl {

using torch::stable::Tensor;

constexpr int kMaxTasks = 128;

DType dtype_of(const Tensor& x);

struct Rows {
  int num_tasks;
  std::vector<Param> params;   // those with a gradient in at least one task, in order
  std::vector<Tensor> copies;  // keeps rows alive whose layout had to be changed
};

// `out`: empty, or K lists of the present parameters; `index`: positions task * num_params + parameter.
// A row whose memory order differs from its parameter's is copied, that tensor alone.
// One [T, P] tensor and no position: a bank of any strides, with `out` empty, one [P] or one [K, P] of dense rows.
// `Out::kWide`: the outputs have the dtype that sums of the gradients are made in, and gradients of 16 bits have the
// memory order of their output.
enum class Out { kSame, kWide };
Rows read_rows(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
               int64_t num_params, const std::vector<Tensor>& out, Out kind = Out::kSame);

}  // namespace fastmtl
