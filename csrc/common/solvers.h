// T x T problems on a Gram matrix, in float64: no torch type, no allocation.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTMTL_HOST_DEVICE __host__ __device__
#else
#define FASTMTL_HOST_DEVICE
#endif

namespace fastmtl {

// A key that is larger by this is the same stream of random numbers one number further on.
constexpr uint64_t kRandomStep = 0x9E3779B97F4A7C15u;

// Number n of the SplitMix64 stream `key` (Steele, Lea, Flood 2014), as the signed integer that orders are sorted by.
FASTMTL_HOST_DEVICE inline int64_t random_number(uint64_t key, uint64_t n) {
  uint64_t z = key + (n + 1) * kRandomStep;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<int64_t>(z ^ (z >> 31));
}

// The numbers of one counter; fastmtl/ops/gradients/order.py says the same.
constexpr uint64_t kNumbersPerCount = 128 * 128;

// Row i of PCGrad's coefficients (Yu et al. 2020, Algorithm 1): c starts as e_i; for each j in visits,
// d = c . M[:, j]; if d < 0, c[j] -= d / M[j, j]. A non-finite entry met, or a j out of range, makes the row NaN.
// product (T values) is scratch: c M, kept up to date so that a visit without a conflict costs nothing.
FASTMTL_HOST_DEVICE inline void pcgrad_row(const double* m, int T, int i, const int64_t* visits, int64_t num_visits,
                                           bool include_self, double* c, double* product) {
  for (int t = 0; t < T; ++t) {
    c[t] = t == i ? 1.0 : 0.0;
    product[t] = m[i * T + t];
  }
  for (int64_t k = 0; k < num_visits; ++k) {
    const int64_t j = visits[k];
    if (j == i && !include_self) continue;
    const bool in_range = j >= 0 && j < T;
    const double d = in_range ? product[j] : NAN;
    const double norm = in_range ? m[j * T + j] : NAN;
    if (!(std::isfinite(d) && std::isfinite(norm))) {
      for (int t = 0; t < T; ++t) c[t] = NAN;
      return;
    }
    if (d < 0 && norm != 0) {
      const double step = d / norm;
      c[j] -= step;
      for (int t = 0; t < T; ++t) product[t] -= step * m[j * T + t];
    }
  }
}

}  // namespace fastmtl
