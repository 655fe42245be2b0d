// The direct product of bfloat16 by dot products of pairs. Weights are added, and rounded to bfloat16 once, on the way
// into a panel that stays in the L2 cache and serves all rows; sums are made in float32 and rounded once. Each result is
// one sum in one order, whatever the threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/simd/kernels.h"
#include "cpu/task_weights/packing.h"
#include "cpu/task_weights/task_conv.h"

namespace fastmtl::cpu {
namespace {

constexpr int64_t kChunk = 768;           // most steps of a sum that a panel of weights holds: 96 KB
constexpr int64_t kOuterPairs = 1 << 16;  // of the input that a pass of the weight gradient keeps in L2
constexpr int64_t kPartRows = 24;         // least rows of a thread that shares its panel with another

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// rows of a product as they lie in memory, or copied side by side
struct Rows16 {
  std::vector<const uint16_t*> at;
  Buffer<uint16_t> own;
};

// input pixels under the filter. whole: followed by a zero where their number is odd
Rows16 input_rows(const Image16& x, const Filter& f, const RowMap& map, bool whole) {
  const int64_t rows = map.count(), length = f.length(), padded = length + length % 2;
  Rows16 found{std::vector<const uint16_t*>(static_cast<size_t>(rows)), nullptr};
  if (f.taps() == 1 && x.stride[1] == 1 && !f.padding[0] && !f.padding[1] && !(whole && length % 2)) {
    for (int64_t m = 0; m < rows; ++m) {
      int64_t sample, h, w;
      map.find(m, &sample, &h, &w);
      found.at[m] =
          x.data + sample * x.stride[0] + h * f.stride[0] * x.stride[2] + w * f.stride[1] * x.stride[3];
    }
    return found;
  }
  found.own = buffer<uint16_t>(rows * padded);
  pack_input<false>(x, f, map, padded, found.own.get());
  for (int64_t m = 0; m < rows; ++m) found.at[m] = found.own.get() + m * padded;
  return found;
}

// pixels of the output's gradient, likewise
Rows16 gradient_rows(const Image16& g, const RowMap& map, bool whole) {
  return input_rows(g, {g.size[1], {1, 1}, {1, 1}, {0, 0}, {1, 1}, true}, map, whole);
}

// The product of rows `first` to `end` with a panel, in tiles of like size; out: [rows][kPanel].
void multiply_rows(const PairTiles& tiles, const uint16_t* const* a, int64_t rows, const uint32_t* panel,
                   int64_t pairs, int64_t lanes, float* out, bool add) {
  const int64_t count = ceil_div(rows, kTall);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t first = t * rows / count, end = (t + 1) * rows / count;
    tiles.multiply(a + first, 1, static_cast<int>(end - first), panel, pairs, lanes, out + first * kPanel, add);
  }
}

// Parts of the rows for each panel, so that all threads get some; they change no sum.
int64_t parts_of(int64_t rows, int64_t panels) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  return std::max<int64_t>(1, std::min(threads / std::max<int64_t>(panels, 1), rows / kPartRows));
}

// y[m][panel of results] = sum over `length` steps of <a_m, panel>, `finish`ed a panel of some rows at a time. make: the
// panel of results `from` on, of `steps` steps from `at` on. a: rows of `length` numbers.
template <class Make, class Finish>
void product(const Rows16& a, int64_t results, int64_t length, const Make& make, const Finish& finish) {
  const PairTiles& tiles = pair_kernels()->tiles;
  const int64_t rows = static_cast<int64_t>(a.at.size()), panels = ceil_div(results, kPanel);
  const int64_t parts = parts_of(rows, panels), chunks = ceil_div(length, kChunk);
  const int64_t chunk = ceil_div(ceil_div(length, chunks), 32) * 32;
  over(panels * parts, std::min(results, kPanel) * length * rows / parts, kProducts, [&](int64_t first, int64_t end) {
    const auto panel = buffer<uint32_t>(chunk / 2 * kPanel);
    const auto out = buffer<float>(ceil_div(rows, parts) * kPanel);
    std::vector<const uint16_t*> from(static_cast<size_t>(rows));
    for (int64_t job = first; job < end; ++job) {
      const int64_t p = job / parts, part = job % parts, lanes = std::min(kPanel, results - p * kPanel);
      const int64_t begin = part * rows / parts, count = (part + 1) * rows / parts - begin;
      for (int64_t k = 0; k < length; k += chunk) {
        const int64_t steps = std::min(chunk, length - k);
        make(p * kPanel, lanes, k, steps, panel.get());
        for (int64_t m = 0; m < count; ++m) from[m] = a.at[begin + m] + k;
        multiply_rows(tiles, from.data(), count, panel.get(), (steps + 1) / 2, lanes, out.get(), k > 0);
      }
      finish(p, begin, count, lanes, out.get());
    }
  });
}

// rows `row` on and columns `column` on of a weight
WeightBlock block_of(const Weights& weights, int64_t row, int64_t rows, int64_t column, int64_t columns,
                     int64_t ahead) {
  const int64_t skip = (row * weights.length + column) * size_of(weights.dtype);
  return {weights.weight ? weights.weight + skip : nullptr,
          weights.delta ? weights.delta + skip : nullptr,
          weights.gate,
          weights.length,
          rows,
          columns,
          ahead};
}

}  // namespace

void direct_forward(const Image16& x, const Filter& f, const RowMap& map, const Weights& weights, const float* bias,
                    const Image16& y) {
  const PairTiles& tiles = pair_kernels()->tiles;
  const WeightPanel across = tiles.across[static_cast<int>(weights.dtype)];
  const Rows16 a = input_rows(x, f, map, true);
  product(
      a, weights.rows, weights.length,
      [&](int64_t from, int64_t lanes, int64_t at, int64_t steps, uint32_t* panel) {
        across(block_of(weights, from, lanes, at, steps, 0), panel);
      },
      [&](int64_t p, int64_t begin, int64_t count, int64_t lanes, const float* out) {
        for (int64_t m = 0; m < count; ++m) {
          int64_t sample, h, w;
          map.find(begin + m, &sample, &h, &w);
          uint16_t* pixel =
              y.data + sample * y.stride[0] + p * kPanel * y.stride[1] + h * y.stride[2] + w * y.stride[3];
          put_narrow(tiles.narrow, out + m * kPanel, bias ? bias + p * kPanel : nullptr, lanes, pixel, y.stride[1]);
        }
      });
}

void direct_input_gradient(const Image16& g, const Filter& f, const RowMap& map, const Weights& weights,
                           const Image16& dx) {
  const PairTiles& tiles = pair_kernels()->tiles;
  const WeightPanel down = tiles.down[static_cast<int>(weights.dtype)];
  const int64_t rows = map.count();
  const Rows16 a = gradient_rows(g, map, true);
  const auto da = buffer<float>(f.panels() * rows * kPanel);
  product(
      a, weights.length, weights.rows,
      [&](int64_t from, int64_t lanes, int64_t at, int64_t steps, uint32_t* panel) {
        down(block_of(weights, at, steps, from, lanes, 0), panel);
      },
      [&](int64_t p, int64_t begin, int64_t count, int64_t, const float* out) {
        std::copy_n(out, count * kPanel, da.get() + (p * rows + begin) * kPanel);
      });
  unpack_input(da.get(), f, map, dx, tiles.narrow);
}

double direct_weight_gradient(const Image16& x, const Image16& g, const Filter& f, const RowMap& map,
                              const Weights& weights, const Spread& spread) {
  const PairTiles& tiles = pair_kernels()->tiles;
  const SpreadRow spread_row = kernels().tiles.spread[static_cast<int>(weights.dtype)];
  const int64_t rows = map.count(), pairs = (rows + 1) / 2, num_out = weights.rows, panels = f.panels();
  const int64_t size = size_of(weights.dtype);
  // both sides as panels: their rows are the steps of the sums
  auto panels_of = [&](const Rows16& a, int64_t columns) {
    auto packed = buffer<uint32_t>(ceil_div(columns, kPanel) * pairs * kPanel);
    over(ceil_div(columns, kPanel), kPanel * rows, kMoves, [&](int64_t first, int64_t end) {
      for (int64_t p = first; p < end; ++p)
        tiles.rows(a.at.data(), rows, p * kPanel, std::min(kPanel, columns - p * kPanel),
                   packed.get() + p * pairs * kPanel);
    });
    return packed;
  };
  const auto a = panels_of(input_rows(x, f, map, false), f.length());
  const auto packed = panels_of(gradient_rows(g, map, false), num_out);
  const int64_t each = ceil_div(kPanel, kTall), pass = std::max<int64_t>(1, kOuterPairs / (pairs * kPanel));
  // tiles of a panel of outputs; one product per tile, added up in order: the same whatever the threads
  const int64_t count = ceil_div(num_out, kPanel) * each;
  std::vector<double> products(static_cast<size_t>(count), 0.0);
  over(count, kTall * f.length() * rows, kProducts, [&](int64_t first, int64_t end) {
    alignas(64) float e[kTall * kPanel];
    const uint16_t* left[kTall];
    for (int64_t p = 0; p < panels; p += pass)
      for (int64_t tile = first; tile < end; ++tile) {
        const int64_t group = tile / each, from = tile % each * kPanel / each, to = (tile % each + 1) * kPanel / each;
        const int64_t n = group * kPanel + from, num = std::min(to - from, num_out - n);
        if (num <= 0) continue;
        for (int64_t i = 0; i < num; ++i)
          left[i] = reinterpret_cast<const uint16_t*>(packed.get() + group * pairs * kPanel + from + i);
        for (int64_t q = p; q < std::min(p + pass, panels); ++q) {
          const int64_t length = std::min(kPanel, f.length() - q * kPanel);
          tiles.multiply(left, kPanel, static_cast<int>(num), a.get() + q * pairs * kPanel, pairs, length, e, false);
          for (int64_t i = 0; i < num; ++i) {
            const int64_t at = (n + i) * f.length() + q * kPanel;
            products[tile] +=
                spread_row(e + i * kPanel, length, weights.gate, spread.gate ? weights.delta + at * size : nullptr,
                           spread.weight ? spread.weight + at : nullptr, spread.add,
                           spread.delta ? spread.delta + at * size : nullptr);
          }
        }
      }
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
  });
  double total = 0;
  for (double one : products) total += one;
  return total;
}

}  // namespace fastmtl::cpu
