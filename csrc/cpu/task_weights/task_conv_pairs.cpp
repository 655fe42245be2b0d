// The direct product of bfloat16 by dot products of pairs. Weights are added, and rounded to bfloat16 once, on the way
// into a panel that stays in the L2 cache and serves all rows; sums are made in float32 and rounded once. Each result
// is one sum in one order, whatever the threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/simd/kernels.h"
#include "cpu/task_weights/packing.h"
#include "cpu/task_weights/task_conv.h"

namespace fastmtl::cpu {
namespace {

constexpr int64_t kChunk = 768;           // most steps of sums that a group's panels of weights hold: 96 KB
constexpr int64_t kDownPanels = 4;        // panels of a group whose sums run along the rows of the weight
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
      found.at[m] = x.data + sample * x.stride[0] + h * f.stride[0] * x.stride[2] + w * f.stride[1] * x.stride[3];
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

// Parts of the rows for each group of panels, so that all threads get some; they change no sum.
int64_t parts_of(int64_t rows, int64_t groups, int64_t threads) {
  return std::max<int64_t>(1, std::min(threads / std::max<int64_t>(groups, 1), rows / kPartRows));
}

// A part of a weight: of results `from` on, steps `at` on of their sums.
struct Part {
  int64_t from, results, at, steps;
};

// rows of memory that a part of a weight lies in, for the next but one product to find in the cache
struct Lines {
  std::vector<const char*> rows;
  int64_t bytes = 0;

  void of(const WeightBlock& block, int64_t size) {
    rows.clear();
    bytes = block.columns * size;
    for (const void* data : {block.w, block.d})
      for (int64_t n = 0; data && n < block.rows; ++n)
        rows.push_back(static_cast<const char*>(data) + n * block.stride * size);
  }
  // the share of step t of `count`
  Ahead share(int64_t t, int64_t count) const {
    const int64_t all = static_cast<int64_t>(rows.size()), first = t * all / count;
    return {rows.data() + first, static_cast<int>((t + 1) * all / count - first), bytes};
  }
};

// The product of rows with `W + s Delta`, whose results lie along its rows (`Down` false: y) or its columns (dx): a
// group of panels of results after the other, and for each the sums in chunks. finish(p, begin, count, lanes, out):
// what becomes of panel p of some rows, [count][kPanel]. held: memory for all, [panels][rows][kPanel]; null: there is
// none.
template <bool kDown, class Finish>
void product(const Rows16& a, const Weights& weights, float* held, const Finish& finish) {
  const PairTiles& tiles = pair_kernels()->tiles;
  const WeightPanel make = (kDown ? tiles.down : tiles.across)[static_cast<int>(weights.dtype)];
  const int64_t results = kDown ? weights.length : weights.rows, length = kDown ? weights.rows : weights.length;
  const int64_t rows = static_cast<int64_t>(a.at.size()), panels = ceil_div(results, kPanel);
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads()), size = size_of(weights.dtype);
  // columns of several panels lie side by side, in one page of memory
  const int64_t of_group = kDown ? std::clamp<int64_t>(panels / threads, 1, kDownPanels) : 1;
  const int64_t groups = ceil_div(panels, of_group), parts = parts_of(rows, groups, threads);
  const int64_t chunks = ceil_div(length * of_group, kChunk), chunk = ceil_div(ceil_div(length, chunks), 32) * 32;
  auto block_of = [&](const Part& part) -> WeightBlock {
    const int64_t row = kDown ? part.at : part.from, column = kDown ? part.from : part.at;
    const int64_t skip = (row * weights.length + column) * size;
    return {weights.weight ? weights.weight + skip : nullptr,
            weights.delta ? weights.delta + skip : nullptr,
            weights.gate,
            weights.length,
            kDown ? part.steps : part.results,
            kDown ? part.results : part.steps};
  };
  auto group_part = [&](int64_t group, int64_t k) -> Part {
    const int64_t from = group * of_group * kPanel;
    return {from, std::min(of_group * kPanel, results - from), k, std::min(chunk, length - k)};
  };
  over(groups * parts, std::min(results, of_group * kPanel) * length * rows / parts, kProducts,
       [&](int64_t first, int64_t end) {
         const int64_t of_panel = chunk / 2 * kPanel, most = ceil_div(rows, parts);
         const auto panel = buffer<uint32_t>(of_group * of_panel);
         const auto scratch = held ? nullptr : buffer<float>(of_group * most * kPanel);
         std::vector<const uint16_t*> from(static_cast<size_t>(most));
         Lines lines;
         for (int64_t job = first; job < end; ++job) {
           const int64_t group = job / parts, part = job % parts;
           const int64_t begin = part * rows / parts, count = (part + 1) * rows / parts - begin;
           const int64_t p0 = group * of_group, num = std::min(of_group, panels - p0);
           const int64_t in_tiles = ceil_div(count, kTall);
           auto out = [&](int64_t q) {
             return held ? held + ((p0 + q) * rows + begin) * kPanel : scratch.get() + q * most * kPanel;
           };
           auto lanes = [&](int64_t q) { return std::min(kPanel, results - (p0 + q) * kPanel); };
           for (int64_t k = 0; k < length; k += chunk) {
             const Part now = group_part(group, k);
             for (int64_t q = 0; q < num; ++q)
               make(block_of({(p0 + q) * kPanel, lanes(q), k, now.steps}), panel.get() + q * of_panel);
             // what comes next is fetched meanwhile
             if (k + chunk < length) lines.of(block_of(group_part(group, k + chunk)), size);
             else if (job + 1 < end) lines.of(block_of(group_part((job + 1) / parts, 0)), size);
             else lines.rows.clear();
             for (int64_t m = 0; m < count; ++m) from[m] = a.at[begin + m] + k;
             for (int64_t q = 0; q < num; ++q)
               for (int64_t t = 0; t < in_tiles; ++t) {
                 const int64_t m = t * count / in_tiles, height = (t + 1) * count / in_tiles - m;
                 tiles.multiply(from.data() + m, 1, static_cast<int>(height), panel.get() + q * of_panel,
                                (now.steps + 1) / 2, lanes(q), out(q) + m * kPanel, k > 0,
                                lines.share(q * in_tiles + t, num * in_tiles));
               }
           }
           for (int64_t q = 0; q < num; ++q) finish(p0 + q, begin, count, lanes(q), out(q));
         }
       });
}

// panels of some rows, rounded, to the pixels of an image that they are
struct Pixels {
  const Image16& image;
  const RowMap& map;
  const float* bias;

  void operator()(int64_t p, int64_t begin, int64_t count, int64_t lanes, const float* out) const {
    const NarrowRow narrow = pair_kernels()->tiles.narrow;
    const int64_t* stride = image.stride;
    for (int64_t m = 0; m < count; ++m) {
      int64_t sample, h, w;
      map.find(begin + m, &sample, &h, &w);
      uint16_t* pixel = image.data + sample * stride[0] + p * kPanel * stride[1] + h * stride[2] + w * stride[3];
      put_narrow(narrow, out + m * kPanel, bias ? bias + p * kPanel : nullptr, lanes, pixel, stride[1]);
    }
  }
};

}  // namespace

void direct_forward(const Image16& x, const Filter& f, const RowMap& map, const Weights& weights, const float* bias,
                    const Image16& y) {
  product<false>(input_rows(x, f, map, true), weights, nullptr, Pixels{y, map, bias});
}

void direct_input_gradient(const Image16& g, const Filter& f, const RowMap& map, const Weights& weights,
                           const Image16& dx) {
  const Rows16 a = gradient_rows(g, map, true);
  const bool own_pixels = f.taps() == 1 && f.stride[0] == 1 && f.stride[1] == 1 && !f.padding[0] && !f.padding[1];
  if (own_pixels) {
    product<true>(a, weights, nullptr, Pixels{dx, map, nullptr});
    return;
  }
  const auto da = buffer<float>(f.panels() * map.count() * kPanel);
  product<true>(a, weights, da.get(), [](int64_t, int64_t, int64_t, int64_t, const float*) {});
  unpack_input(da.get(), f, map, dx, pair_kernels()->tiles.narrow);
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
          tiles.multiply(left, kPanel, static_cast<int>(num), a.get() + q * pairs * kPanel, pairs, length, e, false,
                         {});
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
