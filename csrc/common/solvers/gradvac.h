// GradVac's coefficients: each gradient is turned towards those with which its cosine is below a target.
#pragma once

#include "common/solvers/team.h"

namespace fastmtl::solvers {

// beta: what the newest cosine counts in a target. always: every visit moves its target, and not only one that turns
// the gradient. rounding: the relative error of an entry of the Gram matrix.
struct GradVac {
  double beta;
  bool always;
  double rounding;
};

// Cosines and targets count as at most this in size, for closer to 1 they are rounding: a target of 1 can't be reached.
FASTMTL_HOST_DEVICE inline double largest_cosine(const GradVac& g) { return 1.0 - 8.0 * g.rounding; }

// Of two gradients with the inner product `dot`. A zero gradient's is 0, unless something is not finite.
FASTMTL_HOST_DEVICE inline double cosine(double dot, double left, double right) {
  return left > 0 && right > 0 ? dot / left / right : dot - dot;
}

// What a visit does to the visiting gradient, in units of its first length.
struct Turn {
  double step;    // what is added to it, in lengths of the visited gradient
  double length;  // its own, from then on
  double target;  // of this pair, from then on
};

// length: of the visiting gradient. product: its part along the visited unit gradient, so that product / length is the
// cosine. target: the cosine that it is to have at least. The step that brings it there leaves the part across alone,
// of sqrt(length^2 - product^2), so that the new length is that over sqrt(1 - target^2): it is never a difference of
// squares that were added up, and it is positive.
FASTMTL_HOST_DEVICE inline Turn turn(const GradVac& g, double length, double product, double target) {
  const double most = largest_cosine(g);
  const double along = std::fmin(std::fmax(product, -most * length), most * length);
  const double wanted = std::fmin(std::fmax(target, -most), most);
  const double across = std::sqrt((length - along) * (length + along));
  const double stretched = across / std::sqrt((1.0 - wanted) * (1.0 + wanted));
  const bool turns = along < wanted * length;
  const double moved = target + g.beta * (along / length - target);
  return {turns ? wanted * stretched - along : 0.0, turns ? stretched : length, g.always || turns ? moved : target};
}

// Whether a gradient of this length is more than what rounding leaves of the gradients that it is a sum of. size: the
// sum of their lengths.
FASTMTL_HOST_DEVICE inline bool has_direction(const GradVac& g, double length, double size) {
  return length > 8.0 * g.rounding * size;
}

// Row i of GradVac's coefficients (Wang et al. 2021, Algorithm 1). cosines: [T, T], of the gradients as they came, rows
// of zeros for zero gradients. lengths: [T]. targets: [T], in and out: those of the pairs of i. c: out, [T]. A gradient
// that is zero, or that its steps have brought to zero, has no cosine, and such visits do nothing. A non-finite number
// met, or a j out of range, makes c NaN, and the targets stay as they were in `before`. product (T values) is scratch.
inline void gradvac_row(const GradVac& g, const double* cosines, const double* lengths, int T, int i,
                        const int64_t* visits, int64_t num_visits, const double* before, double* targets, double* c,
                        double* product) {
  for (int t = 0; t < T; ++t) {
    c[t] = t == i ? 1.0 : 0.0;
    product[t] = cosines[i * T + t];
    targets[t] = before[t];
  }
  double length = 1.0, size = 1.0;
  for (int64_t k = 0; k < num_visits; ++k) {
    const int64_t j = visits[k];
    if (j == i) continue;
    const bool in_range = j >= 0 && j < T;
    if (!(in_range && std::isfinite(product[j]) && std::isfinite(lengths[j]) && std::isfinite(lengths[i]) &&
          std::isfinite(targets[j]))) {
      for (int t = 0; t < T; ++t) {
        c[t] = NAN;
        targets[t] = before[t];
      }
      return;
    }
    if (lengths[i] == 0 || lengths[j] == 0 || !has_direction(g, length, size)) continue;
    const Turn found = turn(g, length, product[j], targets[j]);
    targets[j] = found.target;
    if (found.step == 0) continue;
    length = found.length;
    size += std::fabs(found.step);
    c[j] += found.step * (lengths[i] / lengths[j]);
    const double* line = cosines + j * T;
    for (int t = 0; t < T; ++t) product[t] += found.step * line[t];
  }
}

}  // namespace fastmtl::solvers
