// Groups of parameters, each of which has a Gram matrix and weights of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/params.h"

namespace fastmtl {

// Puts the parameters of a group next to each other, group after group, in their order otherwise. groups: the group of
// each of the n parameters, by position. Returns where each group begins in `params`, and the end.
inline std::vector<int64_t> sort_by_group(std::vector<Param>& params, const std::vector<int64_t>& groups,
                                          int64_t num_groups) {
  std::vector<int64_t> first(num_groups + 1, 0);
  for (Param& p : params) {
    p.group = groups[p.position];
    ++first[p.group + 1];
  }
  for (int64_t g = 0; g < num_groups; ++g) first[g + 1] += first[g];
  std::stable_sort(params.begin(), params.end(), [](const Param& a, const Param& b) { return a.group < b.group; });
  return first;
}

}  // namespace fastmtl
