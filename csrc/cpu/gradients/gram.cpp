// M = G G^T. Each chunk of columns leaves its own T x T float64 sums, which are added in order of chunk.
#include "cpu/gradients/gram.h"

#include <torch/csrc/stable/library.h>

#include "cpu/gradients/walk.h"

namespace fastmtl::cpu {

std::vector<double> gram(const Rows& rows) {
  const int T = rows.num_tasks;
  const Plan plan = make_plan(rows);
  const Kernels& kernel = kernels();
  const int64_t size = static_cast<int64_t>(T) * T;
  std::vector<double> partial(std::max<int64_t>(plan.num_chunks, 1) * size, 0.0);
  parallel_chunks(plan, [&](int64_t first, int64_t last) {
    BlockRows block_rows;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double* total = partial.data() + chunk * size;
      for_each_block(rows, plan, chunk, false, [&](const Block& block) {
        block_rows.read(block);
        const int type = static_cast<int>(block.param->dtype);
        // beyond one tile every row is loaded several times: convert it once
        const bool widen = kernel.widen[type] && block_rows.count() > 4;
        const void* const* pointers = widen ? block_rows.widened(block, kernel.widen[type]) : block_rows.pointers();
        kernel.gram[widen ? static_cast<int>(DType::f32) : type](pointers, block_rows.count(), block.length,
                                                                 block_rows.tasks(), total, T,
                                                                 block_rows.count() > 2 ? block_rows.ahead() : Ahead{});
      });
    }
  });
  for (int64_t chunk = 1; chunk < plan.num_chunks; ++chunk)
    for (int64_t k = 0; k < size; ++k) partial[k] += partial[chunk * size + k];
  for (int i = 0; i < T; ++i)
    for (int j = 0; j < i; ++j) partial[i * T + j] = partial[j * T + i];
  partial.resize(size);
  return partial;
}

void write_gram(const std::vector<double>& m, int64_t num_tasks, Tensor& out) {
  const DType type = dtype_of(out);
  STD_TORCH_CHECK(
      out.numel() == num_tasks * num_tasks && out.is_contiguous() && (type == DType::f32 || type == DType::f64),
      "fastmtl: the Gram matrix must be a contiguous [T, T] float32 or float64 tensor");
  if (type == DType::f64) {
    std::copy(m.begin(), m.end(), static_cast<double*>(out.mutable_data_ptr()));
  } else {
    float* target = static_cast<float*>(out.mutable_data_ptr());
    for (size_t k = 0; k < m.size(); ++k) target[k] = static_cast<float>(m[k]);
  }
}

namespace {

void gram_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
             int64_t num_params, Tensor out) {
  write_gram(gram(read_rows(tensors, index, num_tasks, num_params, {})), num_tasks, out);
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("_gram", TORCH_BOX(&fastmtl::cpu::gram_op)); }
