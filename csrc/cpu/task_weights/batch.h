// A batch sorted by task, as the kernels read it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/rows.h"

namespace fastmtl::cpu {

// run(first, end) over parts of 0..count-1
template <class F>
void over(int64_t count, const F& run) {
  if (count > 0) torch::stable::parallel_for(0, count, 1, run);
}

// the batch sorted by task
struct Batch {
  const int64_t* order;
  const int64_t* offsets;
  int64_t num_tasks, num_samples;
  int64_t count(int64_t task) const { return offsets[task + 1] - offsets[task]; }
};

inline Batch batch_of(const Tensor& order, const Tensor& offsets, int64_t num_samples) {
  using torch::headeronly::ScalarType;
  for (const Tensor* x : {&order, &offsets})
    STD_TORCH_CHECK(x->dim() == 1 && x->is_contiguous() && x->scalar_type() == ScalarType::Long,
                    "fastmtl: expected contiguous int64 positions");
  const Batch batch{static_cast<const int64_t*>(order.const_data_ptr()),
                    static_cast<const int64_t*>(offsets.const_data_ptr()), offsets.numel() - 1, num_samples};
  int64_t before = 0;
  for (int64_t t = 0; t <= batch.num_tasks; ++t) {
    STD_TORCH_CHECK(batch.offsets[t] >= before && batch.offsets[t] <= order.numel(),
                    "fastmtl: offsets that do not cut ", order.numel(), " samples by task");
    before = batch.offsets[t];
  }
  for (int64_t i = 0; i < order.numel(); ++i)
    STD_TORCH_CHECK(batch.order[i] >= 0 && batch.order[i] < num_samples, "fastmtl: sample ", batch.order[i], " of ",
                    num_samples);
  return batch;
}

}  // namespace fastmtl::cpu
