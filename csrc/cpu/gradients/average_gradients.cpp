// Running averages of T gradients, and their Gram matrix or squared lengths while each block is in the cache.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "cpu/gradients/walk.h"

namespace fastmtl::cpu {
namespace {

const double* task_numbers(const Tensor& x, int64_t num_tasks) {
  STD_TORCH_CHECK(x.numel() == num_tasks && dtype_of(x) == DType::f64 && x.is_contiguous(),
                  "fastmtl: the factors must be a contiguous [T] float64 tensor");
  return static_cast<const double*>(x.const_data_ptr());
}

void average_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
                int64_t num_params, const Tensor keep, const Tensor take, const std::vector<Tensor>& averages,
                Tensor out) {
  const int T = static_cast<int>(num_tasks);
  const bool gram = out.dim() == 2;
  const int64_t size = gram ? num_tasks * num_tasks : num_tasks;
  STD_TORCH_CHECK(out.numel() == size && dtype_of(out) == DType::f64 && out.is_contiguous(),
                  "fastmtl: the result must be a contiguous [T] or [T, T] float64 tensor");
  const double* kept = task_numbers(keep, num_tasks);
  const double* taken = task_numbers(take, num_tasks);
  auto* result = static_cast<double*>(out.mutable_data_ptr());
  std::fill_n(result, size, 0.0);
  if (tensors.empty()) return;
  const Rows rows = read_rows(tensors, index, num_tasks, num_params, averages, Out::kWide);
  for (const Param& p : rows.params)
    STD_TORCH_CHECK(static_cast<int64_t>(p.out.size()) == num_tasks, "fastmtl: expected ", num_tasks,
                    " averages a parameter, got ", p.out.size());
  const Kernels& kernel = kernels();
  const Plan plan = make_plan(rows);
  std::vector<double> partial(std::max<int64_t>(plan.num_chunks, 1) * size, 0.0);
  int all[kMaxTasks];
  for (int t = 0; t < T; ++t) all[t] = t;
  parallel_chunks(plan, [&](int64_t first, int64_t last) {
    BlockRows block_rows;
    const void* row_of[kMaxTasks];
    const void* average_of[kMaxTasks];
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double* total = partial.data() + chunk * size;
      for_each_block(rows, plan, chunk, [&](const Block& block) {
        const Param& p = *block.param;
        const int type = static_cast<int>(p.dtype), sum_type = static_cast<int>(wide(p.dtype));
        block_rows.read(block);
        std::fill_n(row_of, T, nullptr);
        // a task that gives nothing is not looked at: it may hold anything
        for (int i = 0; i < block_rows.count(); ++i) {
          const int t = block_rows.tasks()[i];
          if (taken[t] != 0) row_of[t] = block_rows.pointers()[i];
        }
        for (int t = 0; t < T; ++t) {
          void* average = static_cast<char*>(p.out[t]) + block.offset * size_of(wide(p.dtype));
          average_of[t] = average;
          if (row_of[t] == nullptr && kept[t] == 1) {
            if (!gram) kernel.elementwise.average[type](nullptr, block.length, 1.0, 0.0, average, total + t);
            continue;
          }
          if (!kernel.elementwise.average[type](row_of[t], block.length, kept[t], taken[t], average,
                                                gram ? nullptr : total + t))
            total[gram ? t * T + t : t] = NAN;
        }
        if (gram) kernel.gram[sum_type](average_of, T, block.length, all, total, T, Ahead{});
      });
    }
  });
  for (int64_t chunk = 0; chunk < plan.num_chunks; ++chunk)
    for (int64_t k = 0; k < size; ++k) result[k] += partial[chunk * size + k];
  if (!gram) return;
  for (int i = 0; i < T; ++i)
    for (int j = 0; j < i; ++j) result[i * T + j] = result[j * T + i];
  // what was not finite shows in the whole row and column
  for (int t = 0; t < T; ++t)
    if (std::isnan(result[t * T + t]))
      for (int s = 0; s < T; ++s) result[t * T + s] = result[s * T + t] = NAN;
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("_average_gradients", TORCH_BOX(&fastmtl::cpu::average_op)); }
