// A batch sorted by task.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/rows.h"

namespace fastmtl::cpu {
namespace {

// the positions of ids sorted by task, stable, and where each task begins; whether all ids are those of a task
template <class Id>
bool sort_by_task(const Id* ids, int64_t count, int64_t num_tasks, int64_t* order, int64_t* offsets) {
  std::fill_n(offsets, num_tasks + 1, int64_t{0});
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = static_cast<int64_t>(ids[i]);
    if (t < 0 || t >= num_tasks) return false;
    ++offsets[t + 1];
  }
  for (int64_t t = 0; t < num_tasks; ++t) offsets[t + 1] += offsets[t];
  std::vector<int64_t> next(offsets, offsets + num_tasks);
  for (int64_t i = 0; i < count; ++i) order[next[static_cast<size_t>(ids[i])]++] = i;
  return true;
}

// false: an id out of range, nothing is sorted
bool task_plan(const Tensor& ids, const Tensor& order, const Tensor& offsets) {
  using torch::headeronly::ScalarType;
  for (const Tensor* x : {&order, &offsets})
    STD_TORCH_CHECK(x->dim() == 1 && x->is_contiguous() && x->scalar_type() == ScalarType::Long,
                    "fastmtl: expected contiguous int64 positions");
  STD_TORCH_CHECK(ids.is_contiguous() && order.numel() == ids.numel() && offsets.numel() > 1 &&
                      (ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int),
                  "fastmtl: expected contiguous ids, int32 or int64");
  auto* to = static_cast<int64_t*>(order.mutable_data_ptr());
  auto* bounds = static_cast<int64_t*>(offsets.mutable_data_ptr());
  const int64_t tasks = offsets.numel() - 1;
  if (ids.scalar_type() == ScalarType::Long)
    return sort_by_task(static_cast<const int64_t*>(ids.const_data_ptr()), ids.numel(), tasks, to, bounds);
  return sort_by_task(static_cast<const int32_t*>(ids.const_data_ptr()), ids.numel(), tasks, to, bounds);
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("_task_plan", TORCH_BOX(&fastmtl::cpu::task_plan)); }
