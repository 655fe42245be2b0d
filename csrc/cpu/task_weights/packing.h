// What the direct products share (task_conv.cpp, task_conv_pairs.cpp): memory, threads, and the way from pictures to
// rows of a product and back.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/simd/kernels.h"
#include "cpu/task_weights/task_conv.h"

namespace fastmtl::cpu {

// memory that begins with a line of the cache, so that no vector of it lies in two
struct Free {
  void operator()(void* data) const { ::operator delete(data, std::align_val_t{64}); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;
template <class T>
Buffer<T> buffer(int64_t count) {
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
  return Buffer<T>(static_cast<T*>(::operator new(bytes, std::align_val_t{64})));
}

// `row` (and `bias`, if there is one) as `length` numbers of bfloat16 that lie `apart` numbers apart; at most kPanel
inline void put_narrow(NarrowRow narrow, const float* row, const float* bias, int64_t length, uint16_t* target,
                       int64_t apart) {
  if (apart == 1) {
    narrow(row, bias, length, target);
    return;
  }
  uint16_t numbers[kPanel];
  narrow(row, bias, length, numbers);
  for (int64_t k = 0; k < length; ++k) target[k * apart] = numbers[k];
}

// multiplications, or numbers moved, that are worth a thread of their own
constexpr int64_t kProducts = 1 << 16, kMoves = 1 << 14;

// run(first, end) over parts of 0..count-1, in threads where each gets `worth` of work; `each`: that of one
template <class F>
void over(int64_t count, int64_t each, int64_t worth, const F& run) {
  const int64_t grain = std::max<int64_t>(1, worth / std::max<int64_t>(each, 1));
  if (count > grain) torch::stable::parallel_for(0, count, grain, run);
  else if (count > 0) run(0, count);
}

// visits the taps of an output pixel: f(tap, pointer to channel 0 of the input pixel, or null outside)
template <class T, class F>
inline void for_each_tap(const ImageOf<T>& x, const Filter& f, int64_t sample, int64_t h, int64_t w, const F& visit) {
  T* base = x.data + sample * x.stride[0];
  int64_t tap = 0;
  for (int64_t i = 0; i < f.kernel[0]; ++i)
    for (int64_t j = 0; j < f.kernel[1]; ++j, ++tap) {
      const int64_t row = h * f.stride[0] - f.padding[0] + i * f.dilation[0];
      const int64_t column = w * f.stride[1] - f.padding[1] + j * f.dilation[1];
      const bool inside = row >= 0 && row < x.size[2] && column >= 0 && column < x.size[3];
      visit(tap, inside ? base + row * x.stride[2] + column * x.stride[3] : nullptr);
    }
}

// Input pixels under the filter, in the order of the weight's rows, zeros behind their length up to `padded`; a:
// [panels][rows][kPanel] with `kCut`, else [rows][padded].
template <bool kCut, class T>
void pack_input(const ImageOf<T>& x, const Filter& f, const RowMap& map, int64_t padded, T* a) {
  const int64_t rows = map.count(), length = f.length(), step = rows * kPanel;
  over(rows, length, kMoves, [&](int64_t first, int64_t end) {
    for (int64_t m = first; m < end; ++m) {
      int64_t sample, h, w;
      map.find(m, &sample, &h, &w);
      T* row = a + m * (kCut ? kPanel : padded);
      auto at = [&](int64_t k) -> T& { return row[kCut ? k / kPanel * step + k % kPanel : k]; };
      for_each_tap(x, f, sample, h, w, [&](int64_t tap, const T* pixel) {
        if (!f.last) {
          const int64_t taps = f.taps();
          for (int64_t c = 0; c < f.channels; ++c) at(c * taps + tap) = pixel ? pixel[c * x.stride[1]] : T{};
          return;
        }
        for (int64_t c = 0; c < f.channels;) {
          const int64_t k = tap * f.channels + c;
          const int64_t run = std::min(kCut ? kPanel - k % kPanel : f.channels, f.channels - c);
          T* target = &at(k);
          if (!pixel) std::fill(target, target + run, T{});
          else if (x.stride[1] == 1) std::copy(pixel + c, pixel + c + run, target);
          else
            for (int64_t i = 0; i < run; ++i) target[i] = pixel[(c + i) * x.stride[1]];
          c += run;
        }
      });
      for (int64_t k = length; k < padded; ++k) at(k) = 0;
    }
  });
}

// Adds da `[panels][rows][kPanel]` back to the input pixels it came from; the samples of dx are overwritten. Sums of
// 16-bit ones are made in float32 and rounded once, by `narrow`.
template <class T>
void unpack_input(const float* da, const Filter& f, const RowMap& map, const ImageOf<T>& dx, NarrowRow narrow) {
  const int64_t rows = map.count(), step = rows * kPanel, per_sample = map.height * map.width;
  constexpr int64_t kSlice = 64;  // channels of one sample that one thread adds up
  const int64_t slices = (f.channels + kSlice - 1) / kSlice;
  over(map.num_samples * slices, std::min(f.channels, kSlice) * per_sample * f.taps(), kMoves,
       [&](int64_t first, int64_t end) {
         Buffer<float> scratch;
         if constexpr (!std::is_same_v<T, float>) scratch = buffer<float>(dx.size[2] * dx.size[3] * kSlice);
         for (int64_t part = first; part < end; ++part) {
           const int64_t s = part / slices, c0 = part % slices * kSlice, c1 = std::min(c0 + kSlice, f.channels);
           ImageOf<float> sums;
           if constexpr (std::is_same_v<T, float>) {
             sums = dx;
             sums.data += map.samples[s] * dx.stride[0] + c0 * dx.stride[1];
           } else {
             sums = {scratch.get(), {0, 1, dx.size[3] * kSlice, kSlice}, {}};
             std::copy_n(dx.size, 4, sums.size);
           }
           const int64_t apart = sums.stride[1], count = c1 - c0;
           for (int64_t h = 0; h < dx.size[2]; ++h)
             for (int64_t w = 0; w < dx.size[3]; ++w) {
               float* pixel = sums.data + h * sums.stride[2] + w * sums.stride[3];
               for (int64_t c = 0; c < count; ++c) pixel[c * apart] = 0;
             }
           for (int64_t r = 0; r < per_sample; ++r) {
             const int64_t m = s * per_sample + r;
             const float* row = da + m * kPanel;
             auto at = [&](int64_t k) -> const float* { return row + k / kPanel * step + k % kPanel; };
             for_each_tap(sums, f, 0, r / map.width, r % map.width, [&](int64_t tap, float* pixel) {
               if (!pixel) return;
               if (!f.last) {
                 const int64_t taps = f.taps();
                 for (int64_t c = c0; c < c1; ++c) pixel[(c - c0) * apart] += *at(c * taps + tap);
                 return;
               }
               for (int64_t c = c0; c < c1;) {
                 const int64_t k = tap * f.channels + c;
                 const int64_t run = std::min(kPanel - k % kPanel, c1 - c);
                 const float* source = at(k);
                 if (apart == 1)
                   for (int64_t i = 0; i < run; ++i) pixel[c - c0 + i] += source[i];
                 else
                   for (int64_t i = 0; i < run; ++i) pixel[(c - c0 + i) * apart] += source[i];
                 c += run;
               }
             });
           }
           if constexpr (!std::is_same_v<T, float>) {
             T* base = dx.data + map.samples[s] * dx.stride[0] + c0 * dx.stride[1];
             for (int64_t h = 0; h < dx.size[2]; ++h)
               for (int64_t w = 0; w < dx.size[3]; ++w)
                 put_narrow(narrow, sums.data + h * sums.stride[2] + w * sums.stride[3], nullptr, count,
                            base + h * dx.stride[2] + w * dx.stride[3], dx.stride[1]);
           }
         }
       });
}

}  // namespace fastmtl::cpu
