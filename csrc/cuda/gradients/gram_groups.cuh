// The Gram matrices of L groups of parameters in one launch: each block leaves the sums of a slot, and the last one of
// a group adds up that group's slots, in a fixed order.
#pragma once

#include "cuda/gradients/gram_mma.cuh"
#include "cuda/gradients/gram_rows.cuh"
#include "cuda/gradients/groups.cuh"

namespace fastmtl::cuda {

// Called by every block after its partial sums are written.
template <int kMost>
__device__ inline void finish_group(const GramGroupsParams& p, int slot, const GroupSlot& mine, int& shared_flag) {
  const GroupSlots& group = mine.group;
  const int T = p.grads.num_tasks, entries = num_entries(T);
  const int num_tickets = (group.count + group.per_ticket - 1) / group.per_ticket;
  unsigned* tickets = p.tickets + group.ticket;
  const double* from = p.partial + static_cast<int64_t>(group.number_begin) * entries;
  int rows = group.count;
  if (num_tickets > 1) {
    const int ticket = (group.number + slot - group.first - group.number_begin) / group.per_ticket;
    const int first = ticket * group.per_ticket;
    const int last = first + group.per_ticket < group.count ? first + group.per_ticket : group.count;
    if (!arrives_last(tickets + ticket, static_cast<unsigned>((last - first) * p.blocks_per_slot), shared_flag)) return;
    double* sums = p.ticket_partial + static_cast<int64_t>(group.ticket) * entries;
    double* row = sums + static_cast<int64_t>(ticket) * entries;
    sum_rows<kMost>(from, first, last, entries, [&](int entry, double sum) { row[entry] = sum; });
    from = sums;
    rows = num_tickets;
    tickets += num_tickets;
  }
  const int expected = num_tickets > 1 ? num_tickets : rows * p.blocks_per_slot;
  if (!arrives_last(tickets, static_cast<unsigned>(expected), shared_flag)) return;
  const int64_t to = static_cast<int64_t>(group.group) * T * T;
  sum_rows<kMost>(from, 0, rows, entries, [&](int entry, double sum) {
    const int i = row_of(T, entry), j = i + entry - entry_of(T, i, i);
    if (p.gram_is_double) {
      auto* out = static_cast<double*>(p.gram) + to;
      out[i * T + j] = out[j * T + i] = sum;
    } else {
      auto* out = static_cast<float*>(p.gram) + to;
      out[i * T + j] = out[j * T + i] = static_cast<float>(sum);
    }
  });
}

template <class Shape>
struct GroupsShared {
  typename Shape::Shared sums;
  GroupSlot mine;
};

template <class In, int kRows>
__global__ void __launch_bounds__(kThreads, sizeof(In) < 8 ? 2 : 1)
    gram_groups_rows_kernel(const __grid_constant__ GramGroupsParams p) {
  using Shared = GroupsShared<RowsShape<In, kRows>>;
  FASTMTL_SHARED(Shared, shared);
  const int slot = static_cast<int>(blockIdx.x);
  const GroupSlot& mine = shared.mine;
  find_group(p.cut, slot, shared.mine);
  leave_row_sums<In, kRows>(
      p.grads, mine.low(p.cut, slot), mine.high(p.cut, slot),
      [&] {
        return p.partial +
               static_cast<int64_t>(mine.group.number + slot - mine.group.first) * num_entries(p.grads.num_tasks);
      },
      shared.sums);
  finish_group<16>(p, slot, mine, shared.sums.flag);
}

template <class In, int kGroups>
__global__ void __launch_bounds__(kThreads, MmaShape<In, kGroups>::kBlocks)
    gram_groups_mma_kernel(const __grid_constant__ GramGroupsParams p) {
  using Shape = MmaShape<In, kGroups>;
  using Shared = GroupsShared<Shape>;
  static_assert(Shape::kBlocks * (sizeof(Shared) + 1024) <= (FASTMTL_KIB_IN_FLIGHT <= 64 ? 100 : 228) * 1024);
  FASTMTL_BIG_SHARED(Shared, shared);
  const int block = static_cast<int>(blockIdx.x), slot = block / p.blocks_per_slot;
  const GroupSlot& mine = shared.mine;
  find_group(p.cut, slot, shared.mine);
  leave_sums<In, kGroups>(
      p.grads, mine.low(p.cut, slot), mine.high(p.cut, slot), block % p.blocks_per_slot,
      [&] {
        return p.partial +
               static_cast<int64_t>(mine.group.number + slot - mine.group.first) * num_entries(p.grads.num_tasks);
      },
      shared.sums);
  finish_group<kGroups == 2 ? 16 : kMaxTasks>(p, slot, mine, shared.sums.flag);
}

}  // namespace fastmtl::cuda
