// T gradient rows of n parameters as the kernels see them: pointers, lengths, element strides, no torch type.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastmtl {

using torch::stable::Tensor;

constexpr int kMaxTasks = 128;

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

inline int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

DType dtype_of(const Tensor& x);

// one row of one parameter: element k lies at data + k * stride elements
struct Row {
  const void* data;
  int64_t stride;
  int task;
};

// one parameter: only the tasks that have a gradient, in order of task
struct Param {
  int64_t numel;
  DType dtype;
  std::vector<Row> rows;
  std::vector<void*> out;  // K outputs of stride 1, in the same memory order; empty for the Gram matrix
};

struct Rows {
  int num_tasks;
  std::vector<Param> params;   // those with a gradient in at least one task, in order
  std::vector<Tensor> copies;  // keeps rows alive whose layout had to be changed
};

// `out`: empty, or K lists of the present parameters; `index`: positions task * num_params + parameter.
// A row whose memory order differs from its parameter's is copied, that tensor alone.
// One [T, P] tensor and no position: a bank of any strides, with `out` empty, one [P] or one [K, P] of dense rows.
Rows read_rows(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
               int64_t num_params, const std::vector<Tensor>& out);

}  // namespace fastmtl
