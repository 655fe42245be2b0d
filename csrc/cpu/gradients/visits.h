// PCGrad's and GradVac's random visiting orders.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/solvers.h"

namespace fastmtl::cpu {

// [T, T] into `visits`: each row the tasks by rising random number, equal ones by task.
inline void draw_visits(uint64_t stream, uint64_t counter, int T, std::vector<int64_t>& visits) {
  visits.resize(static_cast<size_t>(T) * T);
  std::vector<std::pair<int64_t, int>> numbers(T);
  for (int i = 0; i < T; ++i) {
    for (int t = 0; t < T; ++t) numbers[t] = {random_number(stream, counter * kNumbersPerCount + i * T + t), t};
    std::sort(numbers.begin(), numbers.end());
    for (int t = 0; t < T; ++t) visits[i * T + t] = numbers[t].second;
  }
}

}  // namespace fastmtl::cpu
