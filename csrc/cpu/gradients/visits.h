// PCGrad's and GradVac's random visiting orders.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/solvers.h"

namespace fastmtl::cpu {

// [T, T]: each row the tasks by rising random number, equal ones by task. state: key and counter, which is advanced, or
// null.
inline std::vector<int64_t> drawn_visits(uint64_t key, int64_t* state, int T) {
  uint64_t counter = 0;
  if (state != nullptr) {
    key ^= static_cast<uint64_t>(state[0]);
    counter = static_cast<uint64_t>(state[1]++);
  }
  std::vector<int64_t> visits(static_cast<size_t>(T) * T);
  std::vector<std::pair<int64_t, int>> numbers(T);
  for (int i = 0; i < T; ++i) {
    for (int t = 0; t < T; ++t) numbers[t] = {random_number(key, counter * kNumbersPerCount + i * T + t), t};
    std::sort(numbers.begin(), numbers.end());
    for (int t = 0; t < T; ++t) visits[i * T + t] = numbers[t].second;
  }
  return visits;
}

}  // namespace fastmtl::cpu
