// One parameter's gradients as the kernels see them: pointers, lengths, element strides, no torch type.
#pragma once

#include <cstdint>
#include <vector>

namespace fastmtl {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// what sums of a dtype are made in
inline DType wide(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

inline int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

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
  int64_t position = 0;  // among the n parameters
  int64_t group = 0;     // of parameters that share a Gram matrix and weights
  std::vector<Row> rows;
  std::vector<void*> out;  // K outputs of stride 1, in the same memory order; empty for the Gram matrix
};

}  // namespace fastmtl
