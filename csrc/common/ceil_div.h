#pragma once

#include <cstdint>

namespace fastmtl {

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace fastmtl
