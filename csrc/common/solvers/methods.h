// What each method makes of the Gram matrix of T task gradients: T weights, in float64.
#pragma once

#include "common/solvers/complementarity.h"
#include "common/solvers/eigen.h"
#include "common/solvers/fairness.h"
#include "common/solvers/min_norm.h"

namespace fastmtl::solvers {

enum class Kind : int { mgda, cagrad, imtl_g, config, nash_mtl, fairgrad, aligned_mtl, upgrad, dualproj };
constexpr int kKinds = 9;

// options: by kind, as fastmtl/ops/gradients/method_weights.py lists them; kinds in its order, too. rounding: the
// relative error of an entry, as the dtype of the Gram matrix has it.
struct Request {
  Kind kind;
  double options[2];
  double rounding;
};

constexpr double kEpsilon = 2.220446049250313e-16;  // of float64

constexpr int kMatrices = 3;
constexpr int kArrays = 9;

// Float64s of scratch for T tasks.
FASTMTL_HOST_DEVICE constexpr int64_t scratch_size(int T) {
  return static_cast<int64_t>(kMatrices) * T * T + (kArrays + 2) * (T + 2);
}

// The problem of the tasks that take part.
struct Problem {
  int n;
  Matrix m;         // divided by `scale`
  double scale;     // the largest of their squared norms
  double* weights;  // of the user, all equal by default
  double* out;
  Matrix a, b;  // scratch
  double *x, *y, *z, *u, *v, *w, *t;
  int *first, *second;
};

template <class Team>
FASTMTL_HOST_DEVICE void mgda(const Team& team, const Problem& p) {
  Found shortest{INFINITY, 0};
  for (int i = 0; i < p.n; ++i) shortest = smaller(shortest, {p.m[i][i], i});
  team.sync();
  for (int i = team.rank(); i < p.n; i += team.size()) p.out[i] = i == shortest.index ? 1.0 : 0.0;
  min_norm(team, p.m, p.n, p.out, {p.a, p.x, p.y, p.v, p.first});
}

// c: how far, in lengths of the mean gradient g_0, the update may be from g_0. Its direction g_w minimises
// g_w . g_0 + c |g_0| |g_w|. That is the min-norm point of all gradients moved by tau g_0, for the tau at which
// |g_w| = tau c |g_0|: below it the left side is larger, above it the right side. The update is g_0 + g_w / tau.
template <class Team>
FASTMTL_HOST_DEVICE void cagrad(const Team& team, const Problem& p, double c, double rounding) {
  const int n = p.n;
  double mean = 0.0, size = 0.0;  // |g_0|^2, and what its terms add up to
  for (int i = team.rank(); i < n; i += team.size()) {
    double sum = 0.0;
    for (int k = 0; k < n; ++k) {
      sum += p.m[i][k];
      size += std::fabs(p.m[i][k]) / n / n;
    }
    p.z[i] = sum / n;
    mean += sum / n / n;
  }
  mean = team.sum(mean);
  size = team.sum(size);
  if (!(c > 0 && mean > n * rounding * size)) return;  // the mean itself
  const double reach = c * std::sqrt(mean), noise = std::fmax(n * rounding, 1e-12);
  Found shortest{INFINITY, 0};
  for (int i = 0; i < n; ++i) shortest = smaller(shortest, {p.m[i][i], i});
  team.sync();
  for (int i = team.rank(); i < n; i += team.size()) p.w[i] = i == shortest.index ? 1.0 : 0.0;
  // |g_w|, but no less than rounding may have made of zero
  auto norm_at = [&](double tau) {
    team.sync();
    for (int i = team.rank(); i < n; i += team.size())
      for (int k = 0; k < n; ++k) p.b[i][k] = p.m[i][k] + tau * (p.z[i] + p.z[k] + tau * mean);
    min_norm(team, p.b, n, p.w, {p.a, p.x, p.y, p.v, p.first});
    double square = 0.0, terms = 0.0;
    for (int i = team.rank(); i < n; i += team.size())
      for (int k = 0; k < n; ++k) {
        const double term = p.w[i] * p.m[i][k] * p.w[k];
        square += term;
        terms += std::fabs(term);
      }
    square = team.sum(square);
    terms = team.sum(terms);
    return std::sqrt(std::fmax(square, noise * terms));
  };
  // the root of log(|g_w| / (tau c |g_0|)) in log tau: false position, its kept end halved (Illinois), and bisection
  // where that is slow
  double high = std::log(1.0 / reach), low = std::fmax(std::log(norm_at(0.0) / reach), high - 40.0);
  auto excess = [&](double at) { return std::log(norm_at(std::exp(at)) / reach) - at; };
  double at_low = excess(low), at_high = excess(high);
  double root = at_low > 1e-12 ? high : low;  // where one end is the root already
  for (int iteration = 0; iteration < 60 && at_low > 1e-12 && at_high < -1e-12; ++iteration) {
    root = iteration % 3 == 2 ? 0.5 * (low + high) : (low * at_high - high * at_low) / (at_high - at_low);
    if (!(root > low && root < high)) root = 0.5 * (low + high);
    const double here = excess(root);
    if (std::fabs(here) < 1e-12) break;
    if (here > 0) low = root, at_low = here, at_high *= 0.5;
    else high = root, at_high = here, at_low *= 0.5;
  }
  const double tau = std::exp(root);
  norm_at(tau);  // leaves the weights there
  for (int i = team.rank(); i < n; i += team.size())
    if (p.m[i][i] > 0) p.out[i] = 1.0 / n + p.w[i] / tau;
}

// The matrix of cosines into `to`, the norms into p.u; a zero gradient has a row of zeros.
template <class Team>
FASTMTL_HOST_DEVICE void cosines(const Team& team, const Problem& p, Matrix to) {
  for (int i = team.rank(); i < p.n; i += team.size()) p.u[i] = p.m[i][i] > 0 ? std::sqrt(p.m[i][i]) : 0.0;
  team.sync();
  for (int i = team.rank(); i < p.n; i += team.size())
    for (int k = 0; k < p.n; ++k)
      to[i][k] = p.u[i] > 0 && p.u[k] > 0 ? (i == k ? 1.0 : p.m[i][k] / (p.u[i] * p.u[k])) : 0.0;
  team.sync();
}

// out = C^+ b, for the symmetric C in p.b, which is lost. Eigenvalues that rounding may have made count as zero, and so
// do such parts of b.
template <class Team>
FASTMTL_HOST_DEVICE void pseudo_solve(const Team& team, const Problem& p, const double* b, double* out,
                                      double rounding) {
  const int n = p.n;
  eigen(team, p.b, p.a, n, p.x, {p.y, p.v, p.t});
  double largest = 0.0;
  for (int k = 0; k < n; ++k) largest = std::fmax(largest, p.x[k]);
  const double length = std::sqrt(dot(team, b, b, n));
  for (int k = team.rank(); k < n; k += team.size()) {
    double along = 0.0;
    for (int i = 0; i < n; ++i) along += p.a[k][i] * b[i];
    const bool is_there = p.x[k] > n * rounding * largest && std::fabs(along) > n * kEpsilon * length;
    p.v[k] = is_there ? along / p.x[k] : 0.0;
  }
  team.sync();
  for (int i = team.rank(); i < n; i += team.size()) {
    double sum = 0.0;
    for (int k = 0; k < n; ++k) sum += p.a[k][i] * p.v[k];
    out[i] = sum;
  }
  team.sync();
}

// Equal projections on all gradients: K w = |g|, w divided by its sum; on the cosines, which are better conditioned.
template <class Team>
FASTMTL_HOST_DEVICE void imtl_g(const Team& team, const Problem& p, double rounding) {
  cosines(team, p, p.b);
  for (int i = team.rank(); i < p.n; i += team.size()) p.z[i] = p.u[i] > 0 ? 1.0 : 0.0;
  team.sync();
  pseudo_solve(team, p, p.z, p.w, rounding);
  double sum = 0.0, size = 0.0;
  for (int i = 0; i < p.n; ++i) {
    const double v = p.u[i] > 0 ? p.w[i] / p.u[i] : 0.0;
    sum += v;
    size += std::fabs(v);
  }
  const bool none = !(std::fabs(sum) > 1e-12 * size);
  for (int i = team.rank(); i < p.n; i += team.size()) p.out[i] = none || p.u[i] == 0 ? 0.0 : p.w[i] / p.u[i] / sum;
}

// The direction with the wanted share of each unit gradient, at the length of all gradients' projections on it.
template <class Team>
FASTMTL_HOST_DEVICE void config(const Team& team, const Problem& p, double rounding) {
  cosines(team, p, p.b);
  pseudo_solve(team, p, p.weights, p.w, rounding);
  cosines(team, p, p.b);
  multiply(team, p.b, p.w, p.x, p.n);
  team.sync();
  const double square = dot(team, p.w, p.x, p.n), along = dot(team, p.u, p.x, p.n);
  const double factor = square > 0 ? along / square : 0.0;
  for (int i = team.rank(); i < p.n; i += team.size()) p.out[i] = p.u[i] > 0 ? factor * p.w[i] / p.u[i] : 0.0;
}

// alpha = 1 is Nash-MTL. most: the norm that the update has at most; 0: any. K a = a^(-1 / alpha) in the lengths of the
// cosines' coordinates z = |g| a. Each gradient has a part of its own, of the relative size of n roundings, so that
// there is a solution where no direction serves all tasks.
template <class Team>
FASTMTL_HOST_DEVICE void fair(const Team& team, const Problem& p, double alpha, double most, double rounding) {
  cosines(team, p, p.b);
  const double power = 1.0 / alpha;
  for (int i = team.rank(); i < p.n; i += team.size()) {
    p.z[i] = p.u[i] > 0 ? std::pow(p.u[i], power - 1.0) : 1.0;
    p.b[i][i] = 1.0 + p.n * rounding;  // that of a zero gradient too, which is across all others
  }
  team.sync();
  fairness(team, p.b, p.z, p.n, power, p.w, {p.a, p.x});
  double factor = std::pow(p.scale, -1.0 / (1.0 + power));
  if (most > 0) {
    for (int i = team.rank(); i < p.n; i += team.size()) p.x[i] = p.u[i] > 0 ? p.w[i] / p.u[i] : 0.0;
    team.sync();
    multiply(team, p.m, p.x, p.y, p.n);
    team.sync();
    const double norm = factor * std::sqrt(p.scale * std::fmax(dot(team, p.x, p.y, p.n), 0.0));
    if (norm > most) factor *= most / norm;
  }
  for (int i = team.rank(); i < p.n; i += team.size()) p.out[i] = p.u[i] > 0 ? factor * p.w[i] / p.u[i] : 0.0;
}

// options[0]: which eigenvalue all are brought to: 0 the least, 1 their median, 2 their mean; options[1]: whether the
// weights that are not given are 1 instead of 1 / n.
template <class Team>
FASTMTL_HOST_DEVICE void aligned_mtl(const Team& team, const Problem& p, double mode, double rounding) {
  const int n = p.n;
  for (int i = team.rank(); i < n; i += team.size())
    for (int k = 0; k < n; ++k) p.b[i][k] = p.m[i][k];
  team.sync();
  eigen(team, p.b, p.a, n, p.x, {p.y, p.v, p.t});
  double largest = 0.0;
  for (int k = 0; k < n; ++k) largest = p.x[k] > largest ? p.x[k] : largest;
  const double least = n * rounding * largest;
  int rank = 0;
  double smallest = largest, mean = 0.0;
  for (int k = 0; k < n; ++k) {
    if (!(p.x[k] > least)) continue;
    rank += 1;
    smallest = p.x[k] < smallest ? p.x[k] : smallest;
    mean += p.x[k];
  }
  double scale = smallest;
  if (mode == 1) {  // the lower median of those that are not zero
    for (int k = 0; k < n; ++k) {
      if (!(p.x[k] > least)) continue;
      int below = 0;
      for (int i = 0; i < n; ++i) below += p.x[i] > least && (p.x[i] < p.x[k] || (p.x[i] == p.x[k] && i < k));
      if (below == (rank - 1) / 2) scale = p.x[k];
    }
  } else if (mode == 2) {
    scale = mean / (rank > 0 ? rank : 1);
  }
  for (int k = team.rank(); k < n; k += team.size()) {
    double along = 0.0;
    for (int i = 0; i < n; ++i) along += p.a[k][i] * p.weights[i];
    p.v[k] = p.x[k] > least ? along * std::sqrt(scale / p.x[k]) : 0.0;
  }
  team.sync();
  for (int i = team.rank(); i < n; i += team.size()) {
    double sum = 0.0;
    for (int k = 0; k < n; ++k) sum += p.a[k][i] * p.v[k];
    p.out[i] = sum;
  }
}

// The matrix over its trace, plus options[0] times the identity, into p.b.
template <class Team>
FASTMTL_HOST_DEVICE void regularised(const Team& team, const Problem& p, double more) {
  double trace = 0.0;
  for (int i = 0; i < p.n; ++i) trace += p.m[i][i];
  for (int i = team.rank(); i < p.n; i += team.size())
    for (int k = 0; k < p.n; ++k) p.b[i][k] = p.m[i][k] / trace + (i == k ? more : 0.0);
  team.sync();
}

// Each gradient, times its weight, projected on the cone in which no task is in conflict; their sum.
template <class Team>
FASTMTL_HOST_DEVICE void upgrad(const Team& team, const Problem& p, double more) {
  regularised(team, p, more);
  for (int i = team.rank(); i < p.n; i += team.size()) p.out[i] = p.weights[i];
  for (int t = 0; t < p.n; ++t) {
    team.sync();
    for (int i = team.rank(); i < p.n; i += team.size()) p.z[i] = p.b[i][t] * p.weights[t];
    team.sync();
    complementarity(team, p.b, p.z, p.n, more, p.w, {p.a, p.x, p.y, p.first, p.second});
    for (int i = team.rank(); i < p.n; i += team.size()) p.out[i] += p.w[i];
  }
}

// The weighted sum of all gradients, projected on that cone.
template <class Team>
FASTMTL_HOST_DEVICE void dualproj(const Team& team, const Problem& p, double more) {
  regularised(team, p, more);
  multiply(team, p.b, p.weights, p.z, p.n);
  team.sync();
  complementarity(team, p.b, p.z, p.n, more, p.w, {p.a, p.x, p.y, p.first, p.second});
  for (int i = team.rank(); i < p.n; i += team.size()) p.out[i] = p.weights[i] + p.w[i];
}

// gram: [T, T]. present: a flag per task, or null: all. weights: of the user, [T], or null: 1 / n each, of the n tasks
// that take part (aligned_mtl: 1). scratch: `scratch_size(T)`. out: [T], 0 for absent tasks; NaN for all of the others
// where an entry of theirs is not finite.
template <class Team>
FASTMTL_HOST_DEVICE void solve(const Team& team, const Request& request, const double* gram, int T,
                               const uint8_t* present, const double* weights, double* scratch, double* out) {
  Problem p;
  double* next = scratch;
  auto take = [&](int64_t size) {
    double* taken = next;
    next += size;
    return taken;
  };
  p.m = {take(T * T), T};
  p.a = {take(T * T), T};
  p.b = {take(T * T), T};
  double** arrays[] = {&p.x, &p.y, &p.z, &p.u, &p.v, &p.w, &p.t, &p.weights, &p.out};
  for (double** array : arrays) *array = take(T + 2);
  p.first = reinterpret_cast<int*>(take(T + 2));
  p.second = p.first + T;
  int* tasks = reinterpret_cast<int*>(take(T + 2));
  if (team.rank() == 0) {
    int n = 0;
    for (int t = 0; t < T; ++t)
      if (present == nullptr || present[t]) tasks[n++] = t;
    tasks[T] = n;
  }
  team.sync();
  p.n = tasks[T];
  double scale = 0.0;
  bool finite = true;
  for (int i = 0; i < p.n; ++i) {
    const double square = gram[tasks[i] * T + tasks[i]];
    scale = square > scale ? square : scale;
  }
  double bad = 0.0;
  for (int i = team.rank(); i < p.n; i += team.size())
    for (int k = 0; k < p.n; ++k) {
      const double x = gram[tasks[i] * T + tasks[k]];
      if (!std::isfinite(x)) bad += 1.0;
      p.m[i][k] = x / (scale > 0 ? scale : 1.0);
    }
  finite = team.sum(bad) == 0.0;
  p.scale = scale;
  const bool given = weights != nullptr;
  const double share = request.kind == Kind::aligned_mtl && request.options[1] != 0 ? 1.0 : 1.0 / p.n;
  const bool keeps_weights = request.kind == Kind::mgda || request.kind == Kind::cagrad ||
                             request.kind == Kind::upgrad || request.kind == Kind::dualproj;
  for (int i = team.rank(); i < p.n; i += team.size()) {
    p.weights[i] = given ? weights[tasks[i]] : share;
    p.out[i] = keeps_weights ? p.weights[i] : 0.0;  // where all gradients are zero
  }
  for (int t = team.rank(); t < T; t += team.size()) out[t] = 0.0;
  team.sync();
  if (finite && scale > 0) {
    switch (request.kind) {
      case Kind::mgda: mgda(team, p); break;
      case Kind::cagrad: cagrad(team, p, request.options[0], request.rounding); break;
      case Kind::imtl_g: imtl_g(team, p, request.rounding); break;
      case Kind::config: config(team, p, request.rounding); break;
      case Kind::nash_mtl: fair(team, p, 1.0, request.options[0], request.rounding); break;
      case Kind::fairgrad: fair(team, p, request.options[0], 0.0, request.rounding); break;
      case Kind::aligned_mtl: aligned_mtl(team, p, request.options[0], request.rounding); break;
      case Kind::upgrad: upgrad(team, p, request.options[0]); break;
      case Kind::dualproj: dualproj(team, p, request.options[0]); break;
    }
  }
  team.sync();
  for (int i = team.rank(); i < p.n; i += team.size()) out[tasks[i]] = finite ? p.out[i] : NAN;
}

}  // namespace fastmtl::solvers
