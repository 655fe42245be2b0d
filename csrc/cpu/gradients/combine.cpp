// w G and C G, and w G with weights for each group of parameters: one read of G.
#include <torch/csrc/stable/library.h>

#include "common/group_arguments.h"
#include "cpu/gradients/gram.h"
#include "cpu/gradients/walk.h"
#include "cpu/pages.h"

namespace fastmtl::cpu {
namespace {

// results larger than this go past the cache: they would only push the gradients out of it
constexpr int64_t kStreamBytes = int64_t{4} << 20;
// up to so many rows of 32 or 64 bits are read as they come: to follow them is what the hardware does best
constexpr size_t kFewRows = 8;
// results of one pass over a tile
constexpr int64_t kFewResults = 4;

// rows of which the kernel keeps nothing between two passes: a call for each block would take a fifth of their time
bool passes_once(const Param& p, int64_t num_out) {
  return num_out <= kFewResults && p.rows.size() <= kFewRows && size_of(p.dtype) > 2 &&
         std::all_of(p.rows.begin(), p.rows.end(), [](const Row& row) { return row.stride == 1; });
}

// weights_of(p): the [num_out, T] weights of a parameter
template <class WeightsOf>
void combine_with(const WeightsOf& weights_of, int64_t num_out, const Rows& rows) {
  const int T = rows.num_tasks;
  const Plan plan = make_plan(rows);
  const Kernels& kernel = kernels();
  int64_t out_bytes = 0;
  for (const Param& p : rows.params) {
    const int64_t bytes = p.numel * size_of(p.dtype);
    out_bytes += bytes * num_out;
    if (bytes >= kStreamBytes)
      for (void* out : p.out) advise_huge_pages(out, bytes);
  }
  const bool stream = out_bytes >= kStreamBytes;
  parallel_chunks(plan, [&](int64_t first, int64_t last) {
    BlockRows block_rows;
    std::vector<double> in_double(static_cast<size_t>(std::min<int64_t>(num_out, kMaxTasks)) * T);
    std::vector<float> in_float(in_double.size());
    void* out[kMaxTasks];
    const Param* prepared = nullptr;
    int64_t prepared_out = -1;
    auto joined = [&](const Param& p) { return passes_once(p, num_out); };
    for (int64_t chunk = first; chunk < last; ++chunk)
      for_each_block(rows, plan, chunk, joined, [&](const Block& block) {
        const Param& p = *block.param;
        const int count = static_cast<int>(p.rows.size());
        block_rows.read(block);
        const bool fetched = p.rows.size() <= kFewRows && size_of(p.dtype) == 2;
        for (int64_t o = 0; o < num_out; o += kMaxTasks) {
          const int group = static_cast<int>(std::min<int64_t>(kMaxTasks, num_out - o));
          if (prepared != &p || prepared_out != o) {
            // the columns of the weights that this parameter's tasks use
            const double* weights = weights_of(p);
            for (int k = 0; k < group; ++k)
              for (int i = 0; i < count; ++i) {
                in_double[k * count + i] = weights[(o + k) * T + p.rows[i].task];
                in_float[k * count + i] = static_cast<float>(in_double[k * count + i]);
              }
            prepared = &p;
            prepared_out = o;
          }
          for (int k = 0; k < group; ++k) out[k] = static_cast<char*>(p.out[o + k]) + block.offset * size_of(p.dtype);
          const void* w = p.dtype == DType::f64 ? static_cast<const void*>(in_double.data()) : in_float.data();
          kernel.combine[static_cast<int>(p.dtype)](w, group, block_rows.pointers(), count, block.length, out, stream,
                                                    fetched ? block_rows.ahead() : Ahead{});
        }
      });
#if defined(__x86_64__)
    if (stream) __builtin_ia32_sfence();
#endif
  });
}

}  // namespace

void combine(const double* weights, int64_t num_out, const Rows& rows) {
  combine_with([&](const Param&) { return weights; }, num_out, rows);
}

namespace {

void check_outputs(const Rows& rows, int64_t num_out) {
  for (const Param& p : rows.params)
    STD_TORCH_CHECK(static_cast<int64_t>(p.out.size()) == num_out, "fastmtl: expected ", num_out,
                    " outputs a parameter, got ", p.out.size());
}

void combine_op(Tensor weights, const std::vector<Tensor>& tensors, const std::vector<int64_t>& index,
                int64_t num_params, const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(weights.dim() == 2 && dtype_of(weights) == DType::f64 && weights.is_contiguous(),
                  "fastmtl: kernel weights must be a contiguous [K, T] float64 tensor");
  if (tensors.empty() || weights.size(0) == 0) return;
  const Rows rows = read_rows(tensors, index, weights.size(1), num_params, out);
  check_outputs(rows, weights.size(0));
  combine(static_cast<const double*>(weights.const_data_ptr()), weights.size(0), rows);
}

void combine_groups_op(Tensor weights, const std::vector<Tensor>& tensors, const std::vector<int64_t>& index,
                       int64_t num_params, const std::vector<int64_t>& groups, const std::vector<Tensor>& out) {
  STD_TORCH_CHECK(weights.dim() == 2 && dtype_of(weights) == DType::f64 && weights.is_contiguous(),
                  "fastmtl: the weights must be a contiguous [L, T] float64 tensor");
  check_groups(groups, num_params, weights.size(0));
  if (tensors.empty()) return;
  const Rows rows = read_rows(tensors, index, weights.size(1), num_params, out);
  check_outputs(rows, 1);
  const auto* w = static_cast<const double*>(weights.const_data_ptr());
  combine_with([&](const Param& p) { return w + groups[p.position] * rows.num_tasks; }, 1, rows);
}

}  // namespace
}  // namespace fastmtl::cpu

STABLE_TORCH_LIBRARY_IMPL(fastmtl, CPU, m) {
  m.impl("_combine", TORCH_BOX(&fastmtl::cpu::combine_op));
  m.impl("_combine_groups", TORCH_BOX(&fastmtl::cpu::combine_groups_op));
}
