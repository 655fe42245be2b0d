// What each method makes of the Gram matrix of T task gradients: T weights, in float64.
#pragma once

#include "common/solvers/descent.h"
#include "common/solvers/eigen.h"
#include "common/solvers/fairness.h"
#include "common/solvers/krum.h"
#include "common/solvers/min_norm.h"
#include "common/solvers/pareto.h"
#include "common/solvers/priority.h"

namespace fastmtl::solvers {

enum class Kind : int {
  mgda,
  cagrad,
  imtl_g,
  config,
  nash_mtl,
  fairgrad,
  aligned_mtl,
  upgrad,
  dualproj,
  krum,
  pcd,
  sdmgrad,
  modo,
  pareto,
  given  // the preferences as they are, for an average to follow
};
constexpr int kKinds = 15;
constexpr int kMostOptions = 4;

// options: by kind, as fastmtl/ops/gradients/method_weights.py lists them; kinds in its order, too. rounding: the
// relative error of an entry, as the dtype of the Gram matrix has it.
struct Request {
  Kind kind;
  double options[kMostOptions];
  double rounding;
  const double* per_task = nullptr;  // [T], or null; pcd: in place of tau; sdmgrad, modo: the weights to start from
  // What a method keeps from one call to the next, [T] each: changed in place for the tasks that take part, and only
  // where all that they have is finite. Null: nothing. sdmgrad, modo: the weights, NaN where there are none yet, in
  // place of per_task; what is returned is then sdmgrad's mixture of them with the preferences. pcd: the running
  // averages of the squared lengths, times how much they count, and that; scales are made of these in place of the
  // preferences.
  double *kept = nullptr, *counted = nullptr;
  // of sdmgrad and modo, whose `gram` is of two batches: another matrix that must be finite, or none
  Entries also;
  Pareto pareto;
  // A running average of the weights, [T], to be returned in their place: null, or changed as `kept` is; NaN where
  // there is none yet. momentum: what it keeps.
  double* average = nullptr;
  double momentum = 0.0;
  // rows of the problem at most, of which `scratch` is made
  FASTMTL_HOST_DEVICE int rows(int T) const { return kind == Kind::pareto ? T + pareto.num_vectors : T; }
};

constexpr int kMatrices = 3;
constexpr int kArrays = 9;

// Between rows of a matrix of scratch: odd, so that a column lies in as many banks of shared memory as a row.
FASTMTL_HOST_DEVICE constexpr int scratch_step(int T) { return T | 1; }

// Float64s of scratch for T tasks.
FASTMTL_HOST_DEVICE constexpr int64_t scratch_size(int T) {
  return static_cast<int64_t>(kMatrices) * T * scratch_step(T) + (kArrays + 2) * (T + 2);
}

// Of a problem that falls into parts, one per task, those that a team works on: part, part + parts, ... What the teams
// have in `out` then has to be added up.
struct Share {
  int part, parts;
};
constexpr Share kAll{0, 1};
// Whether a method's problem falls into parts.
FASTMTL_HOST_DEVICE constexpr bool has_parts(Kind kind) { return kind == Kind::upgrad; }

// The problem of the tasks that take part.
struct Problem {
  int n;
  Matrix m;         // divided by `scale`
  double scale;     // the largest of their squared norms
  double* weights;  // of the user, all equal by default
  double* out;      // task by task as `each` shares them out
  Matrix a, b;      // scratch
  double *x, *y, *z, *u, *v, *w, *t;
  int* first;
};

// The shortest gradient alone, as weights.
template <class Team>
FASTMTL_HOST_DEVICE void start_at_shortest(const Team& team, const Problem& p, double* w) {
  Found shortest{INFINITY, 0};
  each(team, p.n, [&](int i) { shortest = smaller(shortest, {p.m[i][i], i}); });
  shortest = team.least(shortest);
  each(team, p.n, [&](int i) { w[i] = i == shortest.index ? 1.0 : 0.0; });
}

// Wolfe's method takes a step per gradient of the hull's face. Where the face can be guessed as a whole it starts
// there: y with y >= 0, r = (K + s) y - 1 >= 0, y . r = 0, for any s > 0, is the point's weights but for a factor.
template <class Team>
FASTMTL_HOST_DEVICE void mgda(const Team& team, const Problem& p) {
  const int n = p.n;
  start_at_shortest(team, p, p.out);
  const double shift = smallest_of(team, n, [&](int i) { return p.m[i][i]; });
  if (n > 2 && shift > 0) {
    each(team, n, [&](int i) {
      p.u[i] = 1.0 / std::sqrt(p.m[i][i] + shift);
      p.z[i] = -p.u[i];
    });
    team.sync();
    each_entry(team, n, [&](int i, int k) { p.b[i][k] = (p.m[i][k] + shift) * p.u[i] * p.u[k]; });
    if (complementarity(team, p.b, p.z, n, 1e-6, p.w, {p.a, p.x, p.y, p.first}, true)) {
      const double most = largest_of(team, n, [&](int i) { return p.w[i] * p.u[i]; });
      auto kept = [&](int i) { return p.w[i] * p.u[i] > 1e-9 * most ? p.w[i] * p.u[i] : 0.0; };
      const double total = sum_of(team, n, kept);
      if (most > 0) each(team, n, [&](int i) { p.out[i] = kept(i) / total; });
    }
  }
  min_norm(team, p.m, n, p.out, {p.a, p.x, p.y, p.v, p.first});
}

// What CAGrad adds to the mean's weights, v >= 0, by an active-set method. The update d = g_0 + G^T v is as good as can
// be for the tasks that it is worst for: g_i . d = b_i + (K v)_i >= level, with equality where v_i > 0, and |G^T v| =
// reach. For given tasks with v_i > 0, v = level K^-1 1 - K^-1 b, and a quadratic equation gives the level. It begins
// with the task that g_0 is worst for; those that come off worse than the level join, half as badly as the worst at
// least (or the worst alone, if there is no such level for all of them), and those with a negative v leave. b: in p.z.
// v: out, in p.w. least: a pivot of cosines that is not to be trusted. Whether it came to an end, far enough from what
// rounding makes unsafe.
template <class Team>
FASTMTL_HOST_DEVICE bool cagrad_on_a_face(const Team& team, const Problem& p, double reach, double noise,
                                          double least) {
  const int n = p.n;
  if (!(smallest_of(team, n, [&](int i) { return p.m[i][i]; }) > 0)) return false;
  Found worst{INFINITY, n};
  each(team, n, [&](int i) { worst = smaller(worst, {p.z[i] / std::sqrt(p.m[i][i]), i}); });
  worst = team.least(worst);
  team.sync();
  Members is_free{}, joined{};
  is_free.exchange(worst.index);
  for (int round = 0; round < 2 * n + 8; ++round) {
    const int count = is_free.count();
    // by lengths, which p.u holds: the matrix of cosines
    each(team, n, [&](int i) {
      p.w[i] = 0.0;
      if (!is_free.has(i)) return;
      const int a = is_free.before(i);
      p.first[a] = i;
      p.u[a] = 1.0 / std::sqrt(p.m[i][i]);
      p.x[a] = p.u[a];
      p.y[a] = p.u[a] * p.z[i];
    });
    team.sync();
    each_entry(team, count, [&](int a, int c) {
      if (c >= a) p.a[a][c] = a == c ? 1.0 : p.m[p.first[a]][p.first[c]] * p.u[a] * p.u[c];
    });
    const double pivot = solve_definite(team, p.a, p.x, p.y, count, 0.0, INFINITY);
    each(team, count, [&](int a) {
      p.x[a] *= p.u[a];
      p.y[a] *= p.u[a];
    });
    const double ones = sum_of(team, count, [&](int a) { return p.x[a]; });
    const double across = sum_of(team, count, [&](int a) { return p.y[a]; });  // b . K^-1 1
    const double along = sum_of(team, count, [&](int a) { return p.y[a] * p.z[p.first[a]]; });
    const double inside = across * across - ones * (along - reach * reach);
    Members changed{};
    if (pivot > least && ones > 0 && inside > 0) {
      const double level = (across + std::sqrt(inside)) / ones;
      each(team, count, [&](int a) { p.w[p.first[a]] = level * p.x[a] - p.y[a]; });
      team.sync();
      multiply_with_sizes(team, p.m, p.w, n, [&](int i, double product, double size) {
        p.x[i] = product + p.z[i] - level;
        p.y[i] = size;
      });
      team.sync();
      changed = team.members(n, [&](int i) { return is_free.has(i) && !(p.w[i] > 0); });
      joined = {};
      if (changed.count() == 0) {
        // how far below the level, in lengths of the task's own gradient
        auto under = [&](int i) {
          const double size = std::fabs(p.y[i]) + std::fabs(p.z[i]) + std::fabs(level);
          return !is_free.has(i) && p.x[i] < -1e-14 * size ? -p.x[i] / std::sqrt(p.m[i][i]) : 0.0;
        };
        worst = {INFINITY, n};
        each(team, n, [&](int i) { worst = smaller(worst, {-under(i), i}); });
        worst = team.least(worst);
        const double most = -worst.value;
        if (!(most > 0)) {
          const double terms = sum_of(team, n, [&](int i) { return p.w[i] * p.y[i]; });
          const double total = sum_of(team, n, [&](int i) { return p.w[i]; });
          return reach * reach > noise * terms && total > 0;
        }
        joined = changed = team.members(n, [&](int i) { return under(i) >= 0.5 * most; });
      }
    } else if (joined.count() > 1) {
      // too many at once: the worst of them alone
      changed = joined;
      changed.exchange(worst.index);
      joined = {};
    } else {
      return false;
    }
    is_free.exchange(changed);
    if (is_free.count() == 0) return false;
    team.sync();
  }
  return false;
}

// c: how far, in lengths of the mean gradient g_0, the update may be from g_0. Its direction g_w minimises
// g_w . g_0 + c |g_0| |g_w|. That is the min-norm point of all gradients moved by tau g_0, for the tau at which
// |g_w| = tau c |g_0|: below it the left side is larger, above it the right side. The update is g_0 + g_w / tau.
template <class Team>
FASTMTL_HOST_DEVICE void cagrad(const Team& team, const Problem& p, double c, double rounding) {
  const int n = p.n;
  each(team, n, [&](int i) { p.x[i] = 1.0 / n; });
  team.sync();
  multiply_with_sizes(team, p.m, p.x, n, [&](int i, double product, double size) {
    p.z[i] = product;
    p.y[i] = size;
  });
  team.sync();
  // |g_0|^2, and what its terms add up to
  const double mean = dot(team, p.x, p.z, n), size = dot(team, p.x, p.y, n);
  if (!(c > 0 && mean > n * rounding * size)) return;  // the mean itself
  const double reach = c * std::sqrt(mean), noise = std::fmax(n * rounding, 1e-12);
  if (cagrad_on_a_face(team, p, reach, noise, std::fmin(1e5 * rounding, 1e-6))) {
    each(team, n, [&](int i) { p.out[i] = 1.0 / n + p.w[i]; });
    return;
  }
  start_at_shortest(team, p, p.w);
  // the root of log(|g_w| / (tau c |g_0|)) in log tau: at both ends first, then false position, its kept end halved
  // (Illinois), and bisection where that is slow
  double low = 0.0, high = -std::log(reach), at_low = 0.0, at_high = 0.0, tau = 0.0;
  for (int evaluation = 0; evaluation < 64; ++evaluation) {
    double root = evaluation == 1 ? low : high;
    if (evaluation > 2) {
      root = evaluation % 3 == 2 ? 0.5 * (low + high) : (low * at_high - high * at_low) / (at_high - at_low);
      if (!(root > low && root < high)) root = 0.5 * (low + high);
    }
    tau = evaluation == 0 ? 0.0 : std::exp(root);
    each_entry(team, n, [&](int i, int k) { p.b[i][k] = p.m[i][k] + tau * (p.z[i] + p.z[k] + tau * mean); });
    min_norm(team, p.b, n, p.w, {p.a, p.x, p.y, p.v, p.first});
    multiply_with_sizes(team, p.m, p.w, n, [&](int i, double product, double terms) {
      p.x[i] = product;
      p.y[i] = terms;
    });
    team.sync();
    // |g_w|, but no less than rounding may have made of zero
    const double square = dot(team, p.w, p.x, n), terms = dot(team, p.w, p.y, n);
    const double here = std::log(std::sqrt(std::fmax(square, noise * terms)) / reach) - (evaluation == 0 ? 0.0 : root);
    if (evaluation == 0) {
      // Where no direction serves all tasks, g_w / tau is the same for every tau that is small enough. Rounding spoils
      // it for the smallest ones, which a large c would ask for.
      const bool serves_all = square > noise * terms;
      low = std::fmax(serves_all ? here : here + std::log(std::fmax(c, 1.0)), high - 40.0);
    } else if (evaluation == 1) {
      at_low = here;
      if (!(here > 1e-12)) break;
    } else if (evaluation == 2) {
      at_high = here;
      if (!(here < -1e-12)) break;
    } else {
      if (std::fabs(here) < 1e-12) break;
      if (here > 0) low = root, at_low = here, at_high *= 0.5;
      else high = root, at_high = here, at_low *= 0.5;
    }
  }
  each(team, n, [&](int i) {
    if (p.m[i][i] > 0) p.out[i] = 1.0 / n + p.w[i] / tau;
  });
}

// out = C^+ b, for the matrix C of cosines, which p.b then holds no more. Eigenvalues that rounding may have made count
// as zero, and so do such parts of b. Where every pivot is far above that, C has none, and b is solved for.
template <class Team>
FASTMTL_HOST_DEVICE void pseudo_solve(const Team& team, const Problem& p, const double* b, double* out,
                                      double rounding) {
  const int n = p.n;
  cosines(team, p, p.b);
  each(team, n, [&](int i) { out[i] = b[i]; });
  const double pivot = solve_definite(team, p.b, out, nullptr, n, 0.0, INFINITY);
  if (pivot > std::fmax(1e3 * n * rounding, 1e-8)) return;
  cosines(team, p, p.b);
  eigen(team, p.b, p.a, n, p.x, {p.y, p.v, p.t});
  const double largest = largest_of(team, n, [&](int k) { return p.x[k]; });
  const double length = std::sqrt(dot(team, b, b, n));
  // eigenvectors turn with the rounding of the matrix, and have some of their own
  const double none = std::fmax(4.0 * n, kEntryRoundings) * std::fmax(rounding, 4.0 * kEpsilon) * length;
  multiply(team, p.a, b, n, [&](int k, double along) {
    const bool is_there = p.x[k] > none_of(n, rounding) * largest && std::fabs(along) > none;
    p.v[k] = is_there ? along / p.x[k] : 0.0;
  });
  team.sync();
  multiply_transposed(team, p.a, p.v, n, [&](int i, double sum) { out[i] = sum; });
}

// Equal projections on all gradients: K w = |g|, w divided by its sum; on the cosines, which are better conditioned.
template <class Team>
FASTMTL_HOST_DEVICE void imtl_g(const Team& team, const Problem& p, double rounding) {
  each(team, p.n, [&](int i) { p.z[i] = p.m[i][i] > 0 ? 1.0 : 0.0; });
  pseudo_solve(team, p, p.z, p.w, rounding);
  auto weight = [&](int i) { return p.u[i] > 0 ? p.w[i] / p.u[i] : 0.0; };
  const double sum = sum_of(team, p.n, weight);
  const double size = sum_of(team, p.n, [&](int i) { return std::fabs(weight(i)); });
  const bool none = !(std::fabs(sum) > 1e-12 * size);
  each(team, p.n, [&](int i) { p.out[i] = none ? 0.0 : weight(i) / sum; });
}

// The direction with the wanted share of each unit gradient, at the length of all gradients' projections on it.
template <class Team>
FASTMTL_HOST_DEVICE void config(const Team& team, const Problem& p, double rounding) {
  pseudo_solve(team, p, p.weights, p.w, rounding);
  cosines(team, p, p.b);
  multiply(team, p.b, p.w, p.n, [&](int i, double product) { p.x[i] = product; });
  team.sync();
  const double square = dot(team, p.w, p.x, p.n), along = dot(team, p.u, p.x, p.n);
  const double factor = square > 0 ? along / square : 0.0;
  each(team, p.n, [&](int i) { p.out[i] = p.u[i] > 0 ? factor * p.w[i] / p.u[i] : 0.0; });
}

// alpha = 1 is Nash-MTL. most: the norm that the update has at most; 0: any. K a = a^(-1 / alpha) in the lengths of the
// cosines' coordinates z = |g| a. Each gradient has a part of its own, of the relative size of n roundings, so that
// there is a solution where no direction serves all tasks.
template <class Team>
FASTMTL_HOST_DEVICE void fair(const Team& team, const Problem& p, double alpha, double most, double rounding) {
  cosines(team, p, p.b);
  const double power = 1.0 / alpha;
  each(team, p.n, [&](int i) {
    p.z[i] = p.u[i] > 0 ? p.u[i] : 1.0;
    p.b[i][i] = 1.0 + p.n * rounding;  // that of a zero gradient too, which is across all others
  });
  fairness(team, p.b, p.z, p.n, power, p.w, {p.a, p.x, p.y, p.v});
  double factor = std::pow(p.scale, -1.0 / (1.0 + power));
  if (most > 0) {
    each(team, p.n, [&](int i) { p.x[i] = p.u[i] > 0 ? p.w[i] / p.u[i] : 0.0; });
    team.sync();
    multiply(team, p.m, p.x, p.n, [&](int i, double product) { p.y[i] = product; });
    team.sync();
    const double norm = factor * std::sqrt(p.scale * std::fmax(dot(team, p.x, p.y, p.n), 0.0));
    if (norm > most) factor *= most / norm;
  }
  each(team, p.n, [&](int i) { p.out[i] = p.u[i] > 0 ? factor * p.w[i] / p.u[i] : 0.0; });
}

// options[0]: which eigenvalue all are brought to: 0 the least, 1 their median, 2 their mean; options[1]: whether the
// weights that are not given are 1 instead of 1 / n.
template <class Team>
FASTMTL_HOST_DEVICE void aligned_mtl(const Team& team, const Problem& p, double mode, double rounding) {
  const int n = p.n;
  each_entry(team, n, [&](int i, int k) { p.b[i][k] = p.m[i][k]; });
  team.sync();
  eigen(team, p.b, p.a, n, p.x, {p.y, p.v, p.t});
  const double largest = largest_of(team, n, [&](int k) { return p.x[k]; });
  each(team, n, [&](int i) { p.z[i] = p.m[i][i] > 0 ? std::sqrt(p.m[i][i]) : 0.0; });
  team.sync();
  // no more than entries of these lengths may be off by: a short gradient that is none of the others' is more
  multiply_with_sizes(team, p.a, p.z, n, [&](int k, double, double size) {
    const double least =
        std::fmax(n * rounding * largest, kEntryRoundings * rounding * std::fmin(size * size, largest));
    p.w[k] = p.x[k] > least ? p.x[k] : 0.0;
  });
  team.sync();
  const Members kept = team.members(n, [&](int k) { return p.w[k] > 0; });
  const int rank = kept.count();
  double scale = 0.0;
  if (mode == 0 || mode == 1) {  // the least, or the lower median, of those that are not zero
    const int wanted = mode == 0 ? 0 : (rank - 1) / 2;
    Found at{0.0, n};
    each(team, n, [&](int k) {
      if (!kept.has(k)) return;
      int below = 0;
      for (int i = 0; i < n; ++i) below += p.w[i] > 0 && (p.w[i] < p.w[k] || (p.w[i] == p.w[k] && i < k));
      if (below == wanted) at = {-1.0, k};
    });
    at = team.least(at);
    scale = at.index < n ? p.w[at.index] : 0.0;
  } else {
    scale = sum_of(team, n, [&](int k) { return p.w[k]; }) / (rank > 0 ? rank : 1);
  }
  // what rounding of the eigenvectors makes of preferences that are across one
  const double none = 16.0 * n * kEpsilon * std::sqrt(dot(team, p.weights, p.weights, n));
  multiply(team, p.a, p.weights, n, [&](int k, double along) {
    p.v[k] = p.w[k] > 0 && std::fabs(along) > none ? along * std::sqrt(scale / p.w[k]) : 0.0;
  });
  team.sync();
  multiply_transposed(team, p.a, p.v, n, [&](int i, double sum) { p.out[i] = sum; });
}

// The matrix over its trace, plus options[0] times the identity, into p.b.
template <class Team>
FASTMTL_HOST_DEVICE void regularised(const Team& team, const Problem& p, double more) {
  const double trace = sum_of(team, p.n, [&](int i) { return p.m[i][i]; });
  each_entry(team, p.n, [&](int i, int k) { p.b[i][k] = p.m[i][k] / trace + (i == k ? more : 0.0); });
  team.sync();
}

// Each gradient, times its weight, projected on the cone in which no task is in conflict; their sum.
template <class Team>
FASTMTL_HOST_DEVICE void upgrad(const Team& team, const Problem& p, double more, Share share) {
  regularised(team, p, more);
  each(team, p.n, [&](int i) { p.out[i] = share.part == 0 ? p.weights[i] : 0.0; });
  for (int t = share.part; t < p.n; t += share.parts) {
    each(team, p.n, [&](int i) { p.z[i] = p.b[i][t] * p.weights[t]; });
    complementarity(team, p.b, p.z, p.n, more, p.w, {p.a, p.x, p.y, p.first});
    each(team, p.n, [&](int i) { p.out[i] += p.w[i]; });
  }
}

// The weighted sum of all gradients, projected on that cone.
template <class Team>
FASTMTL_HOST_DEVICE void dualproj(const Team& team, const Problem& p, double more) {
  regularised(team, p, more);
  multiply(team, p.b, p.weights, p.n, [&](int i, double product) { p.z[i] = product; });
  team.sync();
  complementarity(team, p.b, p.z, p.n, more, p.w, {p.a, p.x, p.y, p.first});
  each(team, p.n, [&](int i) { p.out[i] = p.weights[i] + p.w[i]; });
}

// Preferences that are zero for all tasks that take part are none.
template <class Team>
FASTMTL_HOST_DEVICE double total_of_preferences(const Team& team, const Problem& p) {
  const double total = sum_of(team, p.n, [&](int i) { return p.weights[i]; });
  if (total > 0) return total;
  each(team, p.n, [&](int i) { p.weights[i] = 1.0; });  // each member looks at its own alone
  return p.n;
}

// Where a task stands among those that take part; where it does not: the first place.
FASTMTL_HOST_DEVICE inline int place_of(const int* tasks, int n, double task) {
  for (int i = 0; i < n; ++i)
    if (tasks[i] == task) return i;
  return 0;
}

// gram: [T, T]. present: a flag per task, or null: all. weights: of the user, [T], or null: 1 / n each, of the n tasks
// that take part (aligned_mtl: 1). scratch: `scratch_size(request.rows(T))`, or of the team's room. out: [T], 0 for
// absent tasks; NaN for all of the others where an entry of theirs is not finite.
template <class Team>
FASTMTL_HOST_DEVICE FASTMTL_INLINE void solve(const Team& team, const Request& request, Entries gram, int T,
                                              const uint8_t* present, const double* weights, double* scratch,
                                              double* out, Share share = kAll) {
  Problem p;
  double* next = scratch;
  auto take = [&](int64_t size) {
    double* taken = next;
    next += size;
    return taken;
  };
  // where the room is for a known number of tasks, addresses are known to the compiler
  const int room = Team::kRoom > 0 ? Team::kRoom : request.rows(T), step = scratch_step(room);
  p.m = {take(room * step), step};
  p.a = {take(room * step), step};
  p.b = {take(room * step), step};
  double** arrays[] = {&p.x, &p.y, &p.z, &p.u, &p.v, &p.w, &p.t, &p.weights, &p.out};
  for (double** array : arrays) *array = take(room + 2);
  p.first = reinterpret_cast<int*>(take(room + 2));
  int* tasks = reinterpret_cast<int*>(take(room + 2));
  const Members here = team.members(T, [&](int t) { return takes_part(present, t); });
  const bool of_rows = request.kind == Kind::pareto;
  const ParetoRows rows{request.pareto, T, present};
  bool started = false;
  Members members = here;
  if (of_rows) members = active_rows(team, rows, started);
  p.n = members.count();
  each(team, request.rows(T), [&](int row) {
    if (members.has(row)) tasks[members.before(row)] = row;
    if (row < T && !here.has(row)) out[row] = 0.0;
  });
  team.sync();
  double bad = 0.0;
  if (of_rows) {
    gram_of_rows(team, rows, gram, tasks, p.n, p.b, p.m);
    each(team, T, [&](int t) {
      if (!here.has(t)) return;
      if (!std::isfinite(request.pareto.losses[t])) bad += 1.0;
      for (int s = 0; s < T; ++s)
        if (here.has(s) && !std::isfinite(gram.at(t, s))) bad += 1.0;
    });
  }
  p.scale = largest_of(team, p.n, [&](int i) {
    const double square = of_rows ? p.m[i][i] : gram.at(tasks[i], tasks[i]);
    return square > 0 ? square : 0.0;  // of NaN, too
  });
  if (of_rows) team.sync();  // what was read is divided
  each_entry(team, p.n, [&](int i, int k) {
    const double x = of_rows ? p.m[i][k] : gram.at(tasks[i], tasks[k]);
    if (!std::isfinite(x) || (request.also.data != nullptr && !std::isfinite(request.also.at(tasks[i], tasks[k]))))
      bad += 1.0;
    p.m[i][k] = x / (p.scale > 0 ? p.scale : 1.0);
  });
  const bool finite = team.sum(bad) == 0.0;
  // all have read it, in front of several barriers
  if (of_rows && finite && p.n > 0 && team.rank() == 0) {
    if (!started) *request.pareto.start_steps += 1.0;
    *request.pareto.started = started ? 1.0 : 0.0;
  }
  const bool given = weights != nullptr;
  const double even = request.kind == Kind::aligned_mtl && request.options[1] != 0 ? 1.0 : 1.0 / p.n;
  const bool keeps_weights = request.kind == Kind::mgda || request.kind == Kind::cagrad ||
                             request.kind == Kind::upgrad || request.kind == Kind::dualproj ||
                             request.kind == Kind::pareto || request.kind == Kind::given;
  const bool descends = request.kind == Kind::sdmgrad || request.kind == Kind::modo;
  each(team, p.n, [&](int i) {
    const double* per_task = descends && request.kept != nullptr ? request.kept : request.per_task;
    p.weights[i] = given ? weights[tasks[i]] : even;
    // what stays where all gradients are zero; NaN where an entry is not finite, since no method is asked then
    p.out[i] = keeps_weights && share.part == 0 ? p.weights[i] : 0.0;
    if (descends) {
      p.out[i] = per_task != nullptr ? per_task[tasks[i]] : NAN;
      if (std::isnan(p.out[i])) p.out[i] = 1.0 / p.n;
    }
    if (!finite) p.out[i] = NAN;
    if (request.kind != Kind::pcd) return;
    p.t[i] = per_task != nullptr ? per_task[tasks[i]] : request.options[1];
    if (request.kept == nullptr) return;
    // a new average, which is corrected for its start
    const double share_of_new = 1.0 - request.options[2], square = gram.at(tasks[i], tasks[i]);
    const double average = request.options[2] * request.kept[tasks[i]] + share_of_new * square;
    const double count = request.options[2] * request.counted[tasks[i]] + share_of_new;
    p.weights[i] = 1.0 / std::sqrt(average / count + request.options[3]);
    if (!finite) return;
    request.kept[tasks[i]] = average;
    request.counted[tasks[i]] = count;
  });
  team.sync();
  if (finite && (p.scale > 0 || (descends && p.n > 0))) {
    switch (request.kind) {
      case Kind::mgda:
      case Kind::pareto: mgda(team, p); break;
      case Kind::cagrad: cagrad(team, p, request.options[0], request.rounding); break;
      case Kind::imtl_g: imtl_g(team, p, request.rounding); break;
      case Kind::config: config(team, p, request.rounding); break;
      case Kind::nash_mtl: fair(team, p, 1.0, request.options[0], request.rounding); break;
      case Kind::fairgrad: fair(team, p, request.options[0], 0.0, request.rounding); break;
      case Kind::aligned_mtl: aligned_mtl(team, p, request.options[0], request.rounding); break;
      case Kind::upgrad: upgrad(team, p, request.options[0], share); break;
      case Kind::dualproj: dualproj(team, p, request.options[0]); break;
      case Kind::krum: krum(team, p, request.options[0], request.options[1], request.options[2] != 0); break;
      case Kind::pcd: pcd(team, p, place_of(tasks, p.n, request.options[0]), request.rounding); break;
      case Kind::sdmgrad:
        sdmgrad(team, p, request.options[0], request.options[1], static_cast<int>(request.options[2]),
                request.options[3], total_of_preferences(team, p));
        break;
      case Kind::modo: modo(team, p, request.options[0], request.options[1]); break;
      case Kind::given: break;
    }
  }
  if (of_rows) {
    // the solver has ended with a barrier
    each(team, T, [&](int t) {
      if (!rows.has_task(t)) return;
      double sum = 0.0;
      for (int i = 0; i < p.n; ++i) sum += p.out[i] * rows.at(tasks[i], t);
      out[t] = sum;
    });
    return;
  }
  each(team, p.n, [&](int i) { out[tasks[i]] = p.out[i]; });
  if (!descends || request.kept == nullptr) return;
  const bool all_finite = sum_of(team, p.n, [&](int i) { return std::isfinite(p.out[i]) ? 0.0 : 1.0; }) == 0;
  each(team, p.n, [&](int i) {
    if (all_finite) request.kept[tasks[i]] = p.out[i];
  });
  if (request.kind != Kind::sdmgrad) return;
  const double more = request.options[3], total = total_of_preferences(team, p);
  each(team, p.n, [&](int i) { out[tasks[i]] = (p.out[i] + more * p.weights[i] / total) / (1.0 + more); });
}

// The running average of weights that `solve` has left in `out`, in their place. Begins with a sync.
template <class Team>
FASTMTL_HOST_DEVICE void follow(const Team& team, const Request& request, int T, const uint8_t* present, double* out) {
  if (request.average == nullptr) return;
  team.sync();
  const double bad = sum_of(team, T, [&](int t) {
    if (!takes_part(present, t)) return 0.0;
    const double before = request.average[t];
    if (!std::isnan(before)) out[t] = request.momentum * before + (1.0 - request.momentum) * out[t];
    return std::isfinite(out[t]) ? 0.0 : 1.0;
  });
  if (bad > 0) return;
  each(team, T, [&](int t) {
    if (takes_part(present, t)) request.average[t] = out[t];
  });
}

}  // namespace fastmtl::solvers
