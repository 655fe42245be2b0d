// Columns cut by groups of parameters: the parameters of a group follow each other, and no slot lies in two groups.
#pragma once

#include "cuda/gradients/grads.cuh"

namespace fastmtl::cuda {

// The slots of one group in one launch. A table in device memory has these words of each group that has slots there, in
// order, and of one more, which says where the last one ends.
struct GroupSlots {
  int64_t column;        // counted, where the group begins
  int32_t first;         // slot of this launch
  int32_t group;         // among all L
  int32_t number;        // of the first slot, among those of all launches
  int32_t number_begin;  // of the group's slots in all launches, which follow each other
  int32_t count;         // of these
  int32_t per_ticket;    // how many of them share a ticket
  int32_t ticket;        // the group's first
  int32_t unused;
};
constexpr int kGroupWords = sizeof(GroupSlots) / sizeof(int64_t);
static_assert(sizeof(GroupSlots) == kGroupWords * sizeof(int64_t));

// how the columns of a launch are cut
struct GroupCut {
  const GroupSlots* groups;  // device memory, num_groups + 1
  int num_groups;            // that have slots in this launch
  int64_t columns_per_slot;
};

struct GramGroupsParams {
  Grads grads;
  GroupCut cut;
  // One row of T (T + 1) / 2 per slot, and one per ticket. A group has a ticket; where its slots are many, one for each
  // few of them, and one more.
  double* partial;
  double* ticket_partial;
  unsigned* tickets;
  int blocks_per_slot;
  void* gram;  // [L, T, T]
  bool gram_is_double;
};

struct CombineGroupsParams {
  Grads grads;
  GroupCut cut;
  const double* weights;  // [L, T], device memory
};

// what a block works on
struct GroupSlot {
  GroupSlots group;
  int64_t end;  // of the group's columns

  __device__ int64_t low(const GroupCut& cut, int slot) const {
    return group.column + (slot - group.first) * cut.columns_per_slot;
  }
  __device__ int64_t high(const GroupCut& cut, int slot) const {
    const int64_t all = low(cut, slot) + cut.columns_per_slot;
    return all < end ? all : end;
  }
};

// The group of a slot of this launch, by all threads of the block. Ends with a barrier.
__device__ inline void find_group(const GroupCut& cut, int slot, GroupSlot& found) {
  for (int k = threadIdx.x; k < cut.num_groups; k += kThreads) {
    // with what is wanted of the one that is found: later it would be one more latency
    const GroupSlots here = cut.groups[k];
    const int64_t end = cut.groups[k + 1].column;
    if (here.first <= slot && slot < cut.groups[k + 1].first) found = GroupSlot{here, end};
  }
  __syncthreads();
}

}  // namespace fastmtl::cuda
