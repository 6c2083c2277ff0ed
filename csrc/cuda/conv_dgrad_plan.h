// The gradient of a convolution's input, as convolutions of the gradient of its output: plain C++,
// for the host and the tests.
//
// The filters' tap r reaches output row p from input row h = p * stride - padding + r * dilation.
// So of the taps only every so many reach a given row, and which ones depends on the row modulo the
// stride. The input's pixels fall into stride.h * stride.w classes, and the gradient of a class is
// a convolution at stride 1 with the taps that reach it, turned, whose output lies on a grid.
#pragma once

#include <numeric>
#include <vector>

#include "conv_plan.h"

namespace fastres::cuda {

// One axis of a class.
struct DgradAxis {
  int remainder, size;      // rows remainder, remainder + stride, ..., `size` of them
  int first, every, count;  // taps first, first + every, ..., `count` of them
  int start, spacing;  // the last of them reaches output row `start` from the class's first row,
                       // the one before it `spacing` rows further

  static DgradAxis of(int remainder, int size, int taps, int stride, int padding, int dilation) {
    const int every = stride / std::gcd(stride, dilation);
    DgradAxis a{remainder, (size - remainder + stride - 1) / stride, 0, every, 0, 0, 1};
    for (int first = 0; first < std::min(every, taps); ++first) {
      if ((remainder + padding - first * dilation) % stride != 0) continue;
      a.first = first;
      a.count = (taps - first - 1) / every + 1;
      const int last = first + every * (a.count - 1);
      a.start = (remainder + padding - last * dilation) / stride;
      a.spacing = every * dilation / stride;
    }
    return a;
  }

  // Before the first and behind the last row, for `size` rows of output from `rows` of input.
  int padding() const { return -start; }
  int padding_end(int rows) const { return size + spacing * (count - 1) + start - rows; }
};

struct DgradClass {
  DgradAxis h, w;
  ConvShape conv;  // from (N, P, Q, K) to the class's pixels
  PixelGrid grid;  // and where those lie in (N, H, W, C)

  bool has_taps() const { return h.count > 0 && w.count > 0; }
};

// The classes of a convolution's input that have pixels.
inline std::vector<DgradClass> dgrad_classes(const ConvShape& s) {
  std::vector<DgradClass> classes;
  const int p = s.p(), q = s.q();
  for (int a = 0; a < std::min(s.stride.h, s.h); ++a) {
    for (int b = 0; b < std::min(s.stride.w, s.w); ++b) {
      const auto h = DgradAxis::of(a, s.h, s.r, s.stride.h, s.padding.h, s.dilation.h);
      const auto w = DgradAxis::of(b, s.w, s.s, s.stride.w, s.padding.w, s.dilation.w);
      const ConvShape conv{s.n,
                           p,
                           q,
                           s.k,
                           s.c,
                           h.count,
                           w.count,
                           {1, 1},
                           {h.padding(), w.padding()},
                           {h.padding_end(p), w.padding_end(q)},
                           {h.spacing, w.spacing}};
      const bool all = s.stride.h == 1 && s.stride.w == 1;
      const int64_t row = s.w;
      classes.push_back({h, w, conv, {all, a * row + b, s.stride.w, s.stride.h * row, s.h * row}});
    }
  }
  return classes;
}

}  // namespace fastres::cuda
