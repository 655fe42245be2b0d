// The walk over all columns: blocks of one parameter, gathered into chunks that threads share out.
// Blocks and chunks depend on sizes alone, never on the number of threads, and so do the results.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/simd/kernels.h"

namespace fastmtl::cpu {

struct Plan {
  std::vector<int64_t> first_block;     // of each parameter, and the total at the end
  std::vector<int64_t> block_of_chunk;  // the first of each chunk, and the total at the end
  std::vector<int64_t> chunk_of_group;  // likewise, of each group of parameters
  int64_t num_chunks = 0;
};

// first_param: of each group, and the end: no chunk lies in two groups. A group is cut as it would be by itself.
inline Plan make_plan(const Rows& rows, const std::vector<int64_t>& first_param) {
  Plan plan;
  int64_t blocks = 0;
  for (const Param& p : rows.params) {
    plan.first_block.push_back(blocks);
    blocks += (p.numel + kBlock - 1) / kBlock;
  }
  plan.first_block.push_back(blocks);
  for (size_t g = 0; g + 1 < first_param.size(); ++g) {
    plan.chunk_of_group.push_back(static_cast<int64_t>(plan.block_of_chunk.size()));
    const int64_t begin = plan.first_block[first_param[g]], end = plan.first_block[first_param[g + 1]];
    // at most 512 chunks; large enough that a chunk's T x T partial sums stay under 1% of its gradients
    constexpr int64_t kMaxChunks = 512;
    const int64_t each = std::max<int64_t>({(end - begin + kMaxChunks - 1) / kMaxChunks, 4, rows.num_tasks / 4});
    for (int64_t block = begin; block < end; block += each) plan.block_of_chunk.push_back(block);
  }
  plan.num_chunks = static_cast<int64_t>(plan.block_of_chunk.size());
  plan.chunk_of_group.push_back(plan.num_chunks);
  plan.block_of_chunk.push_back(blocks);
  return plan;
}

// of all parameters together
inline Plan make_plan(const Rows& rows) { return make_plan(rows, {0, static_cast<int64_t>(rows.params.size())}); }

struct Block {
  const Param* param;
  int64_t offset;
  int64_t length;
  bool has_next;  // the next block visited follows it in the same parameter
  int64_t next_offset;
};

// joined(param): whether blocks that follow each other in it are visited as one, which may have any length
template <class Joined, class F>
void for_each_block(const Rows& rows, const Plan& plan, int64_t chunk, const Joined& joined, const F& visit) {
  const int64_t begin = plan.block_of_chunk[chunk], end = plan.block_of_chunk[chunk + 1];
  int64_t i =
      std::upper_bound(plan.first_block.begin(), plan.first_block.end() - 1, begin) - plan.first_block.begin() - 1;
  for (int64_t block = begin; block < end;) {
    while (block >= plan.first_block[i + 1]) ++i;
    const Param& p = rows.params[i];
    const int64_t offset = (block - plan.first_block[i]) * kBlock;
    const int64_t blocks = joined(p) ? std::min(end, plan.first_block[i + 1]) - block : 1;
    const int64_t next = offset + blocks * kBlock;
    block += blocks;
    visit(Block{&p, offset, std::min(blocks * kBlock, p.numel - offset), next < p.numel && block < end, next});
  }
}

template <class F>
void for_each_block(const Rows& rows, const Plan& plan, int64_t chunk, const F& visit) {
  for_each_block(rows, plan, chunk, [](const Param&) { return false; }, visit);
}

// chunks over torch's threads, each thread a contiguous range
template <class F>
void parallel_chunks(const Plan& plan, const F& run) {
  if (plan.num_chunks > 0) torch::stable::parallel_for(0, plan.num_chunks, 1, run);
}

// pointers to one block of every row; rows whose stride is not 1 are gathered first
class BlockRows {
 public:
  void read(const Block& block) {
    const Param& p = *block.param;
    const int64_t size = size_of(p.dtype);
    count_ = static_cast<int>(p.rows.size());
    int ahead = 0;
    for (int i = 0; i < count_; ++i) {
      const Row& row = p.rows[i];
      const char* data = static_cast<const char*>(row.data);
      task_[i] = row.task;
      if (row.stride == 1 || p.numel == 1) {
        pointer_[i] = data + block.offset * size;
        if (block.has_next) next_[ahead++] = data + block.next_offset * size;
      } else {
        pointer_[i] = gather(i, data + block.offset * row.stride * size, row.stride, block.length, size);
      }
    }
    ahead_ = {next_, ahead, block.has_next ? std::min(kBlock, p.numel - block.next_offset) * size : 0};
  }
  const void* const* pointers() const { return pointer_; }
  const int* tasks() const { return task_; }
  int count() const { return count_; }
  const Ahead& ahead() const { return ahead_; }

  // the rows as float, for a dtype that would otherwise be converted once per tile
  const void* const* widened(const Block& block, WidenBlock widen) {
    widened_.resize(static_cast<size_t>(count_) * kBlock);
    for (int i = 0; i < count_; ++i) {
      widen(pointer_[i], widened_.data() + i * kBlock, block.length);
      widened_pointer_[i] = widened_.data() + i * kBlock;
    }
    return widened_pointer_;
  }

 private:
  const void* gather(int i, const char* source, int64_t stride, int64_t length, int64_t size) {
    gathered_.resize(static_cast<size_t>(kMaxTasks) * kBlock * 8);
    char* target = gathered_.data() + static_cast<size_t>(i) * kBlock * 8;
    auto move = [&](auto unit) {
      using U = decltype(unit);
      for (int64_t k = 0; k < length; ++k)
        reinterpret_cast<U*>(target)[k] = reinterpret_cast<const U*>(source)[k * stride];
    };
    if (size == 2) move(uint16_t{});
    else if (size == 4) move(uint32_t{});
    else move(uint64_t{});
    return target;
  }

  const void* pointer_[kMaxTasks];
  const void* widened_pointer_[kMaxTasks];
  const char* next_[kMaxTasks];
  int task_[kMaxTasks];
  int count_ = 0;
  Ahead ahead_;
  std::vector<float> widened_;
  std::vector<char> gathered_;
};

}  // namespace fastmtl::cpu
