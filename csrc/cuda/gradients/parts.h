// From parameters to what the launches take: one part per dtype with its pointer table, and a Gram matrix's memory.
// No torch type and no CUDA call, so that tests can run it.
#pragma once

#include <vector>

#include "common/params.h"
#include "cuda/gradients/launch.h"
#include "cuda/gradients/plan.h"

namespace fastmtl::cuda {

// the parameters of one dtype
struct Part {
  DType dtype;
  Grads grads;
  std::vector<int64_t> words;  // what grads.table is to point at, in device memory; empty: there is none
};

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline bool is_aligned16(const Param& p) {
  bool aligned16 = true;
  for (const Row& row : p.rows) aligned16 = aligned16 && row.stride == 1 && is_aligned(row.data);
  for (const void* out : p.out) aligned16 = aligned16 && is_aligned(out);
  return aligned16;
}

inline int64_t counted(int64_t numel) { return ceil_div(numel, kAlign) * kAlign; }

// one bank without a table, whose rows and outputs lie at equal distances
inline Part bank_part(const Param& p, int num_tasks) {
  auto at = [](const void* x) { return reinterpret_cast<intptr_t>(x); };
  Grads g{};
  g.bank = p.rows[0].data;
  g.row_stride = num_tasks > 1 ? at(p.rows[1].data) - at(p.rows[0].data) : 0;
  g.column_stride = p.rows[0].stride;
  g.numel = p.numel;
  g.num_out = static_cast<int>(p.out.size());
  if (g.num_out > 0) g.out = p.out[0];
  if (g.num_out > 1) g.out_stride = at(p.out[1]) - at(p.out[0]);
  g.aligned16 = is_aligned16(p);
  g.num_params = 1;
  g.num_tasks = num_tasks;
  g.columns = counted(p.numel);
  return {p.dtype, g, {}};
}

inline Part list_part(const std::vector<const Param*>& params, int num_tasks) {
  const int64_t n = static_cast<int64_t>(params.size()), T = num_tasks;
  const int64_t num_out = static_cast<int64_t>(params[0]->out.size());
  Part part{params[0]->dtype, Grads{}, std::vector<int64_t>(3 * n + 1 + (2 * T + num_out) * n, 0)};
  int64_t* offset = part.words.data();
  int64_t* numel = offset + n + 1;
  int64_t* aligned16 = numel + n;
  int64_t* row = aligned16 + n;
  int64_t* stride = row + n * T;
  int64_t* out = stride + n * T;
  for (int64_t i = 0; i < n; ++i) {
    const Param& p = *params[i];
    offset[i + 1] = offset[i] + counted(p.numel);
    numel[i] = p.numel;
    aligned16[i] = is_aligned16(p);
    for (const Row& r : p.rows) {
      row[i * T + r.task] = reinterpret_cast<intptr_t>(r.data);
      stride[i * T + r.task] = r.stride;
    }
    for (int64_t k = 0; k < num_out; ++k) out[i * num_out + k] = reinterpret_cast<intptr_t>(p.out[k]);
  }
  part.grads.num_params = static_cast<int>(n);
  part.grads.num_tasks = num_tasks;
  part.grads.num_out = static_cast<int>(num_out);
  part.grads.columns = offset[n];
  return part;
}

// one part per dtype; at least one, which may have no column
inline std::vector<Part> parts_of(const std::vector<Param>& all, int num_tasks, bool is_bank) {
  std::vector<Part> parts;
  if (is_bank && !all.empty()) {
    parts.push_back(bank_part(all[0], num_tasks));
    return parts;
  }
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    std::vector<const Param*> params;
    for (const Param& p : all)
      if (p.dtype == dtype) params.push_back(&p);
    if (!params.empty()) parts.push_back(list_part(params, num_tasks));
  }
  if (parts.empty()) {
    Grads none{};
    none.num_tasks = num_tasks;
    none.num_params = 1;
    parts.push_back({DType::f32, none, {}});
  }
  return parts;
}

// One launch per part. What depends on the caller is left open in params: memory, tickets, result, solve.
struct GramPlan {
  GramParams params;
  std::vector<Slots> slots;
  int64_t words;  // float64s of memory, which begins on 16 bytes

  void use_memory(double* memory) {
    const int64_t entries = num_entries(params.grads.num_tasks);
    params.partial = memory;
    params.group_partial = params.partial + params.num_slots * entries;
    const int64_t sums = (params.num_slots + params.num_groups) * entries;
    params.more = memory + sums + sums % 2;  // on 16 bytes
  }
};

// slots: of each part
inline GramPlan plan_gram(const std::vector<Part>& parts, std::vector<Slots> slots, int slots_per_group) {
  int64_t total = 0;
  for (const Slots& s : slots) total += s.count;
  GramParams p{};
  p.grads = parts[0].grads;
  const int T = p.grads.num_tasks;
  p.num_slots = static_cast<int>(total);
  p.slots_per_group = slots_per_group;
  p.num_groups = static_cast<int>(ceil_div(total, slots_per_group));
  p.blocks_per_slot = blocks_per_slot(T);
  // partial sums, the groups' sums, and the solver's, which begin on 16 bytes
  const int64_t words = (total + p.num_groups) * num_entries(T) + 1 + more_words(T);
  return {p, std::move(slots), words};
}

// launch(dtype, params, slots) for each part, in order
template <class Launch>
void for_each_launch(const GramPlan& plan, const std::vector<Part>& parts, const Launch& launch) {
  GramParams p = plan.params;
  for (size_t k = 0; k < parts.size(); ++k) {
    p.grads = parts[k].grads;
    p.columns_per_slot = plan.slots[k].columns;
    const int count = static_cast<int>(plan.slots[k].count);
    launch(parts[k].dtype, p, count);
    p.first_slot += count;
  }
}

inline void launch_gram(DType dtype, const GramParams& p, int slots, cudaStream_t stream) {
  switch (dtype) {
    case DType::f32: launch_gram<float>(p, slots, stream); break;
    case DType::f64: launch_gram<double>(p, slots, stream); break;
    case DType::bf16: launch_gram<__nv_bfloat16>(p, slots, stream); break;
    case DType::f16: launch_gram<__half>(p, slots, stream); break;
  }
}

inline void launch_combine(DType dtype, const CombineParams& p, const CombineCut& cut, bool early,
                           cudaStream_t stream) {
  switch (dtype) {
    case DType::f32: launch_combine<float>(p, cut, early, stream); break;
    case DType::f64: launch_combine<double>(p, cut, early, stream); break;
    case DType::bf16: launch_combine<__nv_bfloat16>(p, cut, early, stream); break;
    case DType::f16: launch_combine<__half>(p, cut, early, stream); break;
  }
}

}  // namespace fastmtl::cuda
