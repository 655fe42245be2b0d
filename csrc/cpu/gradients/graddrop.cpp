// GradDrop: of each column the elements of one sign, drawn by how much of the column has it. One read of G.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/solvers.h"
#include "cpu/gradients/walk.h"

namespace fastmtl::cpu {
namespace {

// columns that a parameter has at most: the numbers of its columns begin at position * kColumns
constexpr uint64_t kColumns = uint64_t{1} << 40;

void graddrop_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
                 int64_t num_params, int64_t key, const std::optional<Tensor>& state, const std::optional<Tensor>& leak,
                 const std::optional<Tensor>& present, const std::vector<Tensor>& out) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(
      !state.has_value() || (state->numel() == 2 && state->scalar_type() == ScalarType::Long && state->is_contiguous()),
      "fastmtl: the state must be a contiguous [2] int64 tensor");
  STD_TORCH_CHECK(
      !leak.has_value() || (leak->numel() == num_tasks && dtype_of(*leak) == DType::f64 && leak->is_contiguous()),
      "fastmtl: the leaks must be a contiguous [T] float64 tensor");
  STD_TORCH_CHECK(!present.has_value() || (present->numel() == num_tasks &&
                                           present->scalar_type() == ScalarType::Bool && present->is_contiguous()),
                  "fastmtl: the flags must be a contiguous [T] bool tensor");
  if (tensors.empty()) return;
  const Rows rows = read_rows(tensors, index, num_tasks, num_params, out);
  uint64_t stream = static_cast<uint64_t>(key), counter = 0;
  if (state.has_value()) {
    const auto* words = static_cast<const int64_t*>(state->const_data_ptr());
    stream ^= static_cast<uint64_t>(words[0]);
    counter = static_cast<uint64_t>(words[1]);
  }
  // each call has a stream of its own: a counter has too few numbers for all columns
  stream = static_cast<uint64_t>(random_number(stream, counter * kNumbersPerCount));
  const double* leaks = leak.has_value() ? static_cast<const double*>(leak->const_data_ptr()) : nullptr;
  const auto* flags = present.has_value() ? static_cast<const uint8_t*>(present->const_data_ptr()) : nullptr;
  const Kernels& kernel = kernels();
  const Plan plan = make_plan(rows);
  parallel_chunks(plan, [&](int64_t first, int64_t last) {
    BlockRows block_rows;
    double leak_of[kMaxTasks];
    const void* taken[kMaxTasks];
    for (int64_t chunk = first; chunk < last; ++chunk)
      for_each_block(rows, plan, chunk, [&](const Block& block) {
        const Param& p = *block.param;
        block_rows.read(block);
        int count = 0;
        for (int i = 0; i < block_rows.count(); ++i) {
          const int t = block_rows.tasks()[i];
          if (flags != nullptr && flags[t] == 0) continue;
          if (leaks != nullptr) leak_of[count] = leaks[t];
          taken[count++] = block_rows.pointers()[i];
        }
        kernel.elementwise.sign_drop[static_cast<int>(p.dtype)](
            taken, count, block.length, leaks == nullptr ? nullptr : leak_of, stream,
            static_cast<uint64_t>(p.position) * kColumns + static_cast<uint64_t>(block.offset),
            static_cast<char*>(p.out[0]) + block.offset * size_of(p.dtype), block_rows.ahead());
      });
  });
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("_graddrop", TORCH_BOX(&fastmtl::cpu::graddrop_op)); }
