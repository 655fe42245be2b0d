// From groups of parameters to what the launches take: one part per dtype, whose table ends with the slots of the
// groups. No torch type and no CUDA call, so that tests can run it.
#pragma once

#include <vector>

#include "common/groups.h"
#include "cuda/gradients/parts.h"

namespace fastmtl::cuda {

// the parameters of one dtype, group after group
struct GroupedPart {
  Part part;
  std::vector<int64_t> columns;  // counted, of each of the L groups
  GroupCut cut;                  // without `groups`, whose words are the table's last
  int num_slots;

  void use_table(const int64_t* table) {
    part.grads.table = table;
    const size_t words = static_cast<size_t>(cut.num_groups + 1) * kGroupWords;
    cut.groups = reinterpret_cast<const GroupSlots*>(table + part.words.size() - words);
  }
};

// params: as `sort_by_group` leaves them
inline std::vector<GroupedPart> grouped_parts_of(const std::vector<Param>& params, int num_tasks, int64_t num_groups) {
  std::vector<GroupedPart> parts;
  for (Part& part : parts_of(params, num_tasks, false))
    parts.push_back({std::move(part), std::vector<int64_t>(num_groups, 0), {}, 0});
  for (const Param& p : params)
    for (GroupedPart& it : parts)
      if (it.part.dtype == p.dtype) it.columns[p.group] += counted(p.numel);
  return parts;
}

// Cuts a part's columns into slots of so many. describe(group, slots, words): fills in what the launch wants to know of
// a group that has slots here. at_least(group): slots, whether there are columns or not.
template <class AtLeast, class Describe>
void cut_by_group(GroupedPart& it, int64_t columns_per_slot, const AtLeast& at_least, const Describe& describe) {
  std::vector<GroupSlots> found;
  int64_t column = 0, first = 0;
  for (size_t g = 0; g < it.columns.size(); ++g) {
    const int64_t count = std::max<int64_t>(ceil_div(it.columns[g], columns_per_slot), at_least(g));
    if (count > 0) {
      GroupSlots slots{column, static_cast<int32_t>(first), static_cast<int32_t>(g), 0, 0, 0, 0, 0, 0};
      describe(g, count, slots);
      found.push_back(slots);
    }
    column += it.columns[g];
    first += count;
  }
  found.push_back({column, static_cast<int32_t>(first), 0, 0, 0, 0, 0, 0, 0});
  it.cut = {nullptr, static_cast<int>(found.size()) - 1, columns_per_slot};
  it.num_slots = static_cast<int>(first);
  const auto* words = reinterpret_cast<const int64_t*>(found.data());
  it.part.words.insert(it.part.words.end(), words, words + found.size() * kGroupWords);
}

// One launch per part. What depends on the caller is left open: tables, memory, tickets, result.
struct GramGroupsPlan {
  int64_t num_slots;  // of all launches
  int num_tickets;
  int num_entries, blocks_per_slot;

  // float64s of memory
  int64_t words() const { return (num_slots + num_tickets) * num_entries; }

  GramGroupsParams params(const GroupedPart& it, double* memory, unsigned* tickets) const {
    GramGroupsParams p{};
    p.grads = it.part.grads;
    p.cut = it.cut;
    p.partial = memory;
    p.ticket_partial = memory + num_slots * num_entries;
    p.tickets = tickets;
    p.blocks_per_slot = blocks_per_slot;
    return p;
  }
};

// Slots of each group in all parts follow each other. columns_per_slot, per_ticket: of each part, and of all; 0: as
// plan.h says. A group without a column has one slot, whose sums are zeros.
inline GramGroupsPlan plan_gram_groups(std::vector<GroupedPart>& parts, int64_t columns_per_slot, int per_ticket) {
  const int T = parts[0].part.grads.num_tasks;
  const size_t L = parts[0].columns.size();
  std::vector<int64_t> each;
  for (const GroupedPart& it : parts)
    each.push_back(columns_per_slot != 0 ? columns_per_slot : gram_slots(it.part.grads.columns, T).columns);
  std::vector<int64_t> count(L, 0);
  for (size_t k = 0; k < parts.size(); ++k)
    for (size_t g = 0; g < L; ++g) count[g] += ceil_div(parts[k].columns[g], each[k]);
  std::vector<int64_t> at_least(L, 0), begin(L, 0), next(L, 0);
  std::vector<int> share(L, 0), ticket(L, 0);
  GramGroupsPlan plan{0, 0, num_entries(T), blocks_per_slot(T)};
  for (size_t g = 0; g < L; ++g) {
    at_least[g] = count[g] == 0 ? 1 : 0;
    count[g] += at_least[g];
    begin[g] = next[g] = plan.num_slots;
    share[g] = per_ticket != 0 ? per_ticket : slots_per_group(T, count[g]);
    ticket[g] = plan.num_tickets;
    const int first_level = static_cast<int>(ceil_div(count[g], share[g]));
    plan.num_tickets += first_level > 1 ? first_level + 1 : 1;
    plan.num_slots += count[g];
  }
  for (size_t k = 0; k < parts.size(); ++k)
    cut_by_group(
        parts[k], each[k], [&](size_t g) { return k == 0 ? at_least[g] : 0; },
        [&](size_t g, int64_t slots, GroupSlots& it) {
          it.number = static_cast<int32_t>(next[g]);
          it.number_begin = static_cast<int32_t>(begin[g]);
          it.count = static_cast<int32_t>(count[g]);
          it.per_ticket = share[g];
          it.ticket = ticket[g];
          next[g] += slots;
        });
  return plan;
}

// columns_per_slot: 0: as plan.h says
inline void plan_combine_groups(std::vector<GroupedPart>& parts, int64_t columns_per_slot) {
  for (GroupedPart& it : parts) {
    // several outputs: those blocks don't share the tasks among their threads
    const int64_t each = combine_cut(it.part.grads.columns, it.part.grads.num_tasks, 2).slots.columns;
    cut_by_group(
        it, columns_per_slot != 0 ? columns_per_slot : each, [](size_t) { return 0; },
        [](size_t, int64_t, GroupSlots&) {});
  }
}

inline void launch_gram_groups(DType dtype, const GramGroupsParams& p, int slots, cudaStream_t stream) {
  switch (dtype) {
    case DType::f32: launch_gram_groups<float>(p, slots, stream); break;
    case DType::f64: launch_gram_groups<double>(p, slots, stream); break;
    case DType::bf16: launch_gram_groups<__nv_bfloat16>(p, slots, stream); break;
    case DType::f16: launch_gram_groups<__half>(p, slots, stream); break;
  }
}

inline void launch_combine_groups(DType dtype, const CombineGroupsParams& p, int slots, cudaStream_t stream) {
  switch (dtype) {
    case DType::f32: launch_combine_groups<float>(p, slots, stream); break;
    case DType::f64: launch_combine_groups<double>(p, slots, stream); break;
    case DType::bf16: launch_combine_groups<__nv_bfloat16>(p, slots, stream); break;
    case DType::f16: launch_combine_groups<__half>(p, slots, stream); break;
  }
}

}  // namespace fastmtl::cuda
