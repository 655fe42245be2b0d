// The mean of each column without its smallest and largest elements. One read of G, sorted in L1.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>

#include "cpu/gradients/walk.h"

namespace fastmtl::cpu {
namespace {

void trimmed_mean_op(const std::vector<Tensor>& tensors, const std::vector<int64_t>& index, int64_t num_tasks,
                     int64_t num_params, int64_t trim, const std::optional<Tensor>& present,
                     const std::vector<Tensor>& out) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(!present.has_value() || (present->numel() == num_tasks &&
                                           present->scalar_type() == ScalarType::Bool && present->is_contiguous()),
                  "fastmtl: the flags must be a contiguous [T] bool tensor");
  STD_TORCH_CHECK(trim >= 0 && 2 * trim < num_tasks, "fastmtl: expected to trim 0 to (T - 1) / 2 rows, got ", trim);
  if (tensors.empty()) return;
  const Rows rows = read_rows(tensors, index, num_tasks, num_params, out);
  const auto* flags = present.has_value() ? static_cast<const uint8_t*>(present->const_data_ptr()) : nullptr;
  int num_present = 0;
  for (int t = 0; t < rows.num_tasks; ++t) num_present += flags == nullptr || flags[t] != 0;
  const Kernels& kernel = kernels();
  const Plan plan = make_plan(rows);
  parallel_chunks(plan, [&](int64_t first, int64_t last) {
    BlockRows block_rows;
    const void* taken[kMaxTasks];
    for (int64_t chunk = first; chunk < last; ++chunk)
      for_each_block(rows, plan, chunk, [&](const Block& block) {
        const Param& p = *block.param;
        block_rows.read(block);
        int count = 0;
        for (int i = 0; i < block_rows.count(); ++i)
          if (flags == nullptr || flags[block_rows.tasks()[i]] != 0) taken[count++] = block_rows.pointers()[i];
        void* target = static_cast<char*>(p.out[0]) + block.offset * size_of(p.dtype);
        const int cut = static_cast<int>(trim);
        if (num_present > 2 * cut) {
          kernel.elementwise.trimmed_mean[static_cast<int>(p.dtype)](taken, count, num_present - count, cut,
                                                                     block.length, target);
        } else {  // all ones are a NaN of every dtype
          std::memset(target, 0xff, static_cast<size_t>(block.length * size_of(p.dtype)));
        }
      });
  });
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) { m.impl("_trimmed_mean", TORCH_BOX(&fastmtl::cpu::trimmed_mean_op)); }
