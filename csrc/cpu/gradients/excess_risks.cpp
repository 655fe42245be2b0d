// Running sums of squared gradients, and of each task's last gradient the square in the metric that they give.
#include <torch/csrc/stable/library.h>

#include "cpu/gradients/walk.h"

namespace fastmtl::cpu {
namespace {

void excess_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
               int64_t num_params, const Tensor scale, const std::vector<Tensor>& squares, Tensor out) {
  for (const Tensor& x : {scale, out})
    STD_TORCH_CHECK(x.numel() == num_tasks && dtype_of(x) == DType::f64 && x.is_contiguous(),
                    "fastmtl: scales and results must be contiguous [T] float64 tensors");
  const auto* scales = static_cast<const double*>(scale.const_data_ptr());
  auto* result = static_cast<double*>(out.mutable_data_ptr());
  std::fill_n(result, num_tasks, 0.0);
  if (tensors.empty()) return;
  const Rows rows = read_rows(tensors, index, num_tasks, num_params, squares, Out::kWide);
  for (const Param& p : rows.params)
    STD_TORCH_CHECK(static_cast<int64_t>(p.out.size()) == num_tasks, "fastmtl: expected ", num_tasks,
                    " sums a parameter, got ", p.out.size());
  const Kernels& kernel = kernels();
  const Plan plan = make_plan(rows);
  std::vector<double> partial(std::max<int64_t>(plan.num_chunks, 1) * num_tasks, 0.0);
  parallel_chunks(plan, [&](int64_t first, int64_t last) {
    BlockRows block_rows;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double* total = partial.data() + chunk * num_tasks;
      for_each_block(rows, plan, chunk, [&](const Block& block) {
        const Param& p = *block.param;
        block_rows.read(block);
        for (int i = 0; i < block_rows.count(); ++i) {
          const int t = block_rows.tasks()[i];
          if (scales[t] == 0) continue;  // a task that is not there may hold anything
          total[t] += kernel.elementwise.excess[static_cast<int>(p.dtype)](
              block_rows.pointers()[i], block.length, scales[t],
              static_cast<char*>(p.out[t]) + block.offset * size_of(wide(p.dtype)));
        }
      });
    }
  });
  for (int64_t chunk = 0; chunk < plan.num_chunks; ++chunk)
    for (int64_t t = 0; t < num_tasks; ++t) result[t] += partial[chunk * num_tasks + t];
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("_excess_risks", TORCH_BOX(&fastmtl::cpu::excess_op)); }
