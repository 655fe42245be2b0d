// Samples of a batch norm, as the kernels read them.
#pragma once

#include <cstdint>

#include "common/params.h"

namespace fastmtl::cpu {

// x as [N, C, P] or, `rows`, [N, P, C]
struct Pictures {
  int64_t samples, channels, pixels;
  bool rows;
  DType dtype;
  int64_t bytes;  // of an element
  int64_t of_sample() const { return channels * pixels * bytes; }
};

}  // namespace fastmtl::cpu
