// M = G G^T, of all parameters or of each group of them. Each chunk of columns leaves its own T x T float64 sums, which
// are added in order of chunk.
#include "cpu/gradients/gram.h"

#include <torch/csrc/stable/library.h>

#include "common/group_arguments.h"
#include "cpu/gradients/walk.h"

namespace fastmtl::cpu {

namespace {

// so many rows the hardware follows by itself; docs/kernels/cpu-kernels.md has the figures
constexpr int kFollowed = 4;

// [L, T, T]; first_param: of each group of parameters, and the end
std::vector<double> grams(const Rows& rows, const std::vector<int64_t>& first_param) {
  const int T = rows.num_tasks;
  const Plan plan = make_plan(rows, first_param);
  const Kernels& kernel = kernels();
  const PairKernels* pairs = pair_kernels();
  const int64_t size = static_cast<int64_t>(T) * T;
  std::vector<double> partial(std::max<int64_t>(plan.num_chunks, 1) * size, 0.0);
  parallel_chunks(plan, [&](int64_t first, int64_t last) {
    BlockRows block_rows;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double* total = partial.data() + chunk * size;
      for_each_block(rows, plan, chunk, [&](const Block& block) {
        block_rows.read(block);
        const int type = static_cast<int>(block.param->dtype);
        const Ahead ahead = block_rows.count() > kFollowed ? block_rows.ahead() : Ahead{};
        if (pairs && block.param->dtype == DType::bf16) {
          pairs->gram(block_rows.pointers(), block_rows.count(), block.length, block_rows.tasks(), total, T, ahead);
          return;
        }
        // beyond one tile every row is loaded several times: convert it once
        const bool widen = kernel.widen[type] && block_rows.count() > 4;
        const void* const* pointers = widen ? block_rows.widened(block, kernel.widen[type]) : block_rows.pointers();
        kernel.gram[widen ? static_cast<int>(DType::f32) : type](pointers, block_rows.count(), block.length,
                                                                 block_rows.tasks(), total, T, ahead);
      });
    }
  });
  const size_t num_groups = first_param.size() - 1;
  std::vector<double> result(num_groups * size, 0.0);
  for (size_t g = 0; g < num_groups; ++g) {
    double* m = result.data() + g * size;
    for (int64_t chunk = plan.chunk_of_group[g]; chunk < plan.chunk_of_group[g + 1]; ++chunk)
      for (int64_t k = 0; k < size; ++k) m[k] += partial[chunk * size + k];
    for (int i = 0; i < T; ++i)
      for (int j = 0; j < i; ++j) m[i * T + j] = m[j * T + i];
  }
  return result;
}

void write(const std::vector<double>& m, Tensor& out) {
  if (dtype_of(out) == DType::f64) {
    std::copy(m.begin(), m.end(), static_cast<double*>(out.mutable_data_ptr()));
  } else {
    float* target = static_cast<float*>(out.mutable_data_ptr());
    for (size_t k = 0; k < m.size(); ++k) target[k] = static_cast<float>(m[k]);
  }
}

}  // namespace

std::vector<double> gram(const Rows& rows) { return grams(rows, {0, static_cast<int64_t>(rows.params.size())}); }

void write_gram(const std::vector<double>& m, int64_t num_tasks, Tensor& out) {
  const DType type = dtype_of(out);
  STD_TORCH_CHECK(
      out.numel() == num_tasks * num_tasks && out.is_contiguous() && (type == DType::f32 || type == DType::f64),
      "fastmtl: the Gram matrix must be a contiguous [T, T] float32 or float64 tensor");
  write(m, out);
}

namespace {

void gram_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
             int64_t num_params, Tensor out) {
  write_gram(gram(read_rows(tensors, index, num_tasks, num_params, {})), num_tasks, out);
}

void gram_groups_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
                    int64_t num_params, const std::vector<int64_t>& groups, Tensor out) {
  const int64_t num_groups = check_group_grams(out, num_tasks);
  check_groups(groups, num_params, num_groups);
  Rows rows = read_rows(tensors, index, num_tasks, num_params, {});
  const std::vector<int64_t> first_param = sort_by_group(rows.params, groups, num_groups);
  write(grams(rows, first_param), out);
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_gram", TORCH_BOX(&fastmtl::cpu::gram_op));
  m.impl("_gram_groups", TORCH_BOX(&fastmtl::cpu::gram_groups_op));
}
