// How the columns of a call are cut among blocks: by T and the number of columns alone, so that sums are added in the
// same order on every card.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/ceil_div.h"

namespace fastmtl::cuda {

struct Slots {
  int64_t columns;  // of a slot
  int64_t count;
};

// blocks that share a slot's columns, each with the products of some of the tasks
inline int blocks_per_slot(int T) {
  const int bands = (T + 31) / 32;
  return T <= 64 ? 1 : bands * (bands - 1) / 2;
}

// The longest slot to 8 tasks: so that no float32 sum has more than 96 additions. Of gradients whose products are all
// equal each addition errs the same way, by up to half a unit, which no later sum averages out. With more tasks blocks
// see to that by themselves.
constexpr int64_t kLongestSlot = 24576;

// counted columns (see grads.cuh) of one launch
inline Slots gram_slots(int64_t columns, int T) {
  // few columns: one wave of blocks, as many as a multiprocessor has room for, with one that draws an order from 17
  // tasks on; many: slots enough that the last ones end together, on cards of any size
  const int64_t few = (T <= 16 ? 264 : 131) / blocks_per_slot(T);
  const int64_t many = (T <= 16 ? 1056 : 528) / blocks_per_slot(T);
  const int64_t shortest = T > 8 ? 256 : 1024;  // a few steps of a block
  const int64_t even = T > 16 ? 16384 : 4096;
  const int64_t wanted =
      std::clamp(columns / even, std::min(few, std::max<int64_t>(ceil_div(columns, shortest), 1)), many);
  int64_t each = ceil_div(std::max<int64_t>(ceil_div(columns, wanted), 1), 64) * 64;
  if (T <= 8) each = std::min(each, kLongestSlot);
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

// How many slots share a ticket: all of them where one block adds them up in a few rounds of loads, else about as many
// as there are tickets. A second level takes another ticket and another round.
inline int slots_per_group(int T, int64_t slots) {
  const int64_t at_once = T <= 8 ? 128 : T <= 16 ? 64 : T <= 32 ? 16 : T <= 64 ? 8 : 4;
  int64_t each = T <= 8 ? 64 : 1;
  if (slots <= at_once) each = slots;
  while (each * each < slots && T > 8) ++each;
  return static_cast<int>(std::max(each, ceil_div(slots, kMaxGroups)));
}

}  // namespace fastmtl::cuda
