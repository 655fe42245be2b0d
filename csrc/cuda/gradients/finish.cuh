// From the blocks' partial sums to the Gram matrix, and on to the T x T problem, without another launch: the block that
// arrives last at a ticket adds up what the others have left, in a fixed order.
#pragma once

#include "cuda/gradients/grads.cuh"
#include "cuda/gradients/solve.cuh"

namespace fastmtl::cuda {

struct GramParams {
  Grads grads;
  int64_t columns_per_slot;
  // partial sums, one row of T (T + 1) / 2 per slot: M[i][j], i <= j, row by row. The slots of all launches of one call
  // (one per dtype) are counted through, and cut into groups: a ticket for each, and one more for the groups.
  double* partial;
  double* group_partial;
  unsigned* tickets;
  int first_slot, num_slots;  // of this launch, of all
  int slots_per_group, num_groups;
  int blocks_per_slot;
  double* more;  // for the solver, see SolverMemory
  void* gram;    // the result
  bool gram_is_double;
  Solve solve;
  bool next_is_early;  // the launch behind the last one is a combine kernel by launch_early, and no one else's
};

__host__ __device__ inline int num_entries(int T) { return T * (T + 1) / 2; }
__device__ inline int entry_of(int T, int i, int j) { return i * T - i * (i - 1) / 2 + (j - i); }  // i <= j

// The row of an entry: rows before row i have i T - i (i - 1) / 2 entries. A square root may be off by one.
__device__ inline int row_of(int T, int entry) {
  const float b = static_cast<float>(2 * T + 1);
  int i = static_cast<int>((b - sqrtf(b * b - 8.0f * static_cast<float>(entry))) * 0.5f);
  while (entry_of(T, i, i) > entry) --i;
  while (entry_of(T, i + 1, i + 1) <= entry) ++i;
  return i;
}

// Whether this block is the last of `expected` at the ticket, which is then ready for the next launch.
__device__ inline bool arrives_last(unsigned* ticket, unsigned expected, int& shared_flag) {
  // The barrier hands the block's writes to thread 0, whose release passes on all that it has seen; what thread 0 then
  // acquires, the second barrier hands to the block. Readers pass by the first-level cache, which may hold old lines.
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = add_acq_rel(ticket, 1u) == expected - 1;
    if (last) *ticket = 0;  // all have come
    shared_flag = last;
  }
  __syncthreads();
  return shared_flag != 0;
}

// Sums rows first, ..., last - 1 of `from` column by column, in a fixed order; write(column, sum) by one thread each.
// What it takes is rounds of latency: a thread has kDown rows of kAcross columns on their way at once.
template <int kAcross, int kDown, class Write>
__device__ inline void sum_rows_of(const double* from, int first, int last, int columns, const Write& write) {
  const int tid = threadIdx.x;
  // as many threads to a column as there are to spare, each a warp's share at most
  int split = 1;
  while (split < kWarp && 2 * split * columns <= kThreads) split *= 2;
  const int per_round = kThreads / split;
  for (int base = 0; base < columns; base += kAcross * per_round) {
    const int column = base + tid / split;
    double sum[kAcross] = {};
    for (int r = first + tid % split; r < last; r += kDown * split) {
      double x[kAcross][kDown];
#pragma unroll
      for (int a = 0; a < kAcross; ++a)
#pragma unroll
        for (int u = 0; u < kDown; ++u) {
          const int c = column + a * per_round;
          const bool here = c < columns && r + u * split < last;
          x[a][u] = here ? __ldcg(from + static_cast<int64_t>(r + u * split) * columns + c) : 0.0;
        }
#pragma unroll
      for (int a = 0; a < kAcross; ++a)
#pragma unroll
        for (int u = 0; u < kDown; ++u) sum[a] += x[a][u];
    }
#pragma unroll
    for (int a = 0; a < kAcross; ++a) {
      const int c = column + a * per_round;
      for (int step = split / 2; step > 0; step /= 2) sum[a] += __shfl_xor_sync(~0u, sum[a], step);
      if (c < columns && tid % split == 0) write(c, sum[a]);
    }
  }
}

template <int kMost, class Write>
__device__ inline void sum_rows(const double* from, int first, int last, int columns, const Write& write) {
  // to 16 tasks no thread has a second column
  if constexpr (kMost <= 16) sum_rows_of<1, 16>(from, first, last, columns, write);
  else sum_rows_of<4, 8>(from, first, last, columns, write);
}

// The first launch of a call that draws its order apart has one block more: the first, so that it is done early.
__host__ __device__ inline int drawing_blocks(const GramParams& p) {
  return p.first_slot == 0 && draws_apart(p.solve, p.grads.num_tasks) ? 1 : 0;
}

// All that the drawing block does before `finish`.
template <int kMost>
__device__ inline void draw_apart(const GramParams& p, SolverMemory<kMost>& memory) {
  const int T = p.grads.num_tasks;
  // all of `words` for random numbers, however many tasks there are: the order is left in device memory
  const Scratch scratch = memory.template scratch<64>(T, p.more);
  draw_order<kMaxTasks>(p.solve, T, scratch, reinterpret_cast<uint8_t*>(p.more + order_at(T)));
}

constexpr int kNoSlot = -1;

// Called by every block after its partial sums are written, with their slot, and by the one that draws, with kNoSlot.
// kTasks: as many at most. `memory` may lie where the sums have been.
template <int kTasks, int kMost>
__device__ inline void finish(const GramParams& p, int slot, int& shared_flag, SolverMemory<kMost>& memory) {
  // from here on little is read, and the combine kernel's first rows may come in the meantime
  if (p.next_is_early) next_launch_may_begin();
  const int T = p.grads.num_tasks, entries = num_entries(T);
  const bool several = p.num_groups > 1;
  if (several && slot != kNoSlot) {
    const int group = slot / p.slots_per_group;
    const int first = group * p.slots_per_group;
    const int last = first + p.slots_per_group < p.num_slots ? first + p.slots_per_group : p.num_slots;
    if (!arrives_last(p.tickets + group, static_cast<unsigned>((last - first) * p.blocks_per_slot), shared_flag))
      return;
    double* mine = p.group_partial + static_cast<int64_t>(group) * entries;
    sum_rows<kMost>(p.partial, first, last, entries, [&](int entry, double sum) { mine[entry] = sum; });
  }
  // the last ticket, to which the block that draws comes too
  constexpr bool kMayDrawApart = kTasks > 16;
  const bool apart = kMayDrawApart && draws_apart(p.solve, T);
  const int expected = (several ? p.num_groups : p.num_slots * p.blocks_per_slot) + (apart ? 1 : 0);
  if (!arrives_last(p.tickets + (several ? p.num_groups : 0), static_cast<unsigned>(expected), shared_flag)) return;
  const Scratch scratch = memory.template scratch<kTasks>(T, p.more);
  bool unusual = false;
  if constexpr (!kMayDrawApart) unusual = p.solve.wanted && stage_order<kTasks>(p.solve, T, scratch);
  else if (apart) fetch_order(T, reinterpret_cast<const int64_t*>(p.more + order_at(T)), scratch);
  else if (p.solve.wanted) unusual = copy_order<kTasks>(p.solve, T, scratch);
  // This matrix is made of gradients. Rounded sums break |M[i][j]|^2 <= M[i][i] M[j][j] by a little, or by a factor
  // where norms are next to 0, which cannot overflow in 128 visits; a caller's matrix is tested for it, entry by entry.
  auto write_gram = [&](int entry, double sum) {
    const int i = row_of(T, entry), j = i + entry - entry_of(T, i, i);
    unusual = scratch.put(T, i, j, sum) || unusual;
    if (i != j) scratch.put(T, j, i, sum);
    else unusual = scratch.put_norm(i, sum) || unusual;
    if (p.gram_is_double) {
      auto* out = static_cast<double*>(p.gram);
      out[i * T + j] = out[j * T + i] = sum;
    } else {
      auto* out = static_cast<float*>(p.gram);
      out[i * T + j] = out[j * T + i] = static_cast<float>(sum);
    }
  };
  if (!several) sum_rows<kMost>(p.partial, 0, p.num_slots, entries, write_gram);
  else sum_rows<kMost>(p.group_partial, 0, p.num_groups, entries, write_gram);
  if (!p.solve.wanted) return;
  scratch.tell(unusual);
  __syncthreads();
  solve_pcgrad<kTasks>(p.solve, T, scratch);
}

}  // namespace fastmtl::cuda
