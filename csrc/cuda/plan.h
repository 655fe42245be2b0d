// How the columns of a call are cut among blocks: by T and the number of columns alone, so that sums are added in the
// same order on every card.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastmtl::cuda {

struct Slots {
  int64_t columns;  // of a slot
  int64_t count;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The longest slot: so that no float32 sum has more than some hundred additions. Of gradients whose products are all
// equal each addition errs the same way, by up to half a unit, which no later sum averages out.
inline int64_t longest_slot(int T) { return T <= 8 ? 24576 : T <= 32 ? 8192 : 3072; }

// counted columns (see grads.cuh) of one launch
inline Slots gram_slots(int64_t columns, int T) {
  // few columns: one wave of blocks, of which two fit on a multiprocessor, or with more tasks one; many: small slots
  // enough that the last ones end together
  constexpr int64_t kMany = 1056;
  const bool many_tasks = T > 16;
  const int64_t shortest = T > 8 ? 256 : 1024;  // a few steps of a block
  const int64_t few = std::min<int64_t>(many_tasks ? 128 : 264, ceil_div(columns, shortest));
  const int64_t wanted = std::clamp(columns / (many_tasks ? 16384 : 4096), std::max<int64_t>(few, 1), kMany);
  const int64_t even = ceil_div(std::max<int64_t>(ceil_div(columns, wanted), 1), 64) * 64;
  const int64_t each = std::min(even, longest_slot(T));
  return {each, std::max<int64_t>(ceil_div(columns, each), 1)};
}

// what a block of the combine kernel takes
struct CombineCut {
  Slots slots;
  bool split;  // its threads share the tasks too
};

// columns of a block that splits the tasks
constexpr int kSplitColumns = 256;

// counted columns of one launch
inline CombineCut combine_cut(int64_t columns, int T, int num_out) {
  // one block of 1024 columns, eight rows at a time, to each of some 250 leaves memory idle: more loads are in flight
  // if threads share the rows
  constexpr int64_t kMostSplit = 256 * 1024;
  if (num_out == 1 && T > 8 && columns <= kMostSplit) return {{kSplitColumns, ceil_div(columns, kSplitColumns)}, true};
  constexpr int64_t kMany = 1056, kShortest = 1024, kLongest = 16384;
  const int64_t each = std::clamp(ceil_div(ceil_div(columns, kMany), 64) * 64, kShortest, kLongest);
  return {{each, ceil_div(columns, each)}, false};
}

constexpr int kMaxGroups = 255;

// how many slots share a ticket: one group where the last block reads little, else about as many groups as slots
inline int slots_per_group(int T, int64_t slots) {
  int64_t each = T <= 16 ? (slots <= 128 ? slots : 64) : 1;
  if (T > 16)
    while (each * each < slots) ++each;
  return static_cast<int>(std::max(each, ceil_div(slots, kMaxGroups)));
}

}  // namespace fastmtl::cuda
