// How a convolution comes through ctypes.
#pragma once

#include "../../csrc/cuda/conv_plan.h"

// n, h, w, c, k, r, s, then stride, padding and dilation as (h, w)
inline fastres::cuda::ConvShape shape_of(const int64_t* v) {
  const auto i = [&](int j) { return static_cast<int>(v[j]); };
  const auto pair = [&](int j) { return fastres::cuda::Pair{i(j), i(j + 1)}; };
  return {v[0], i(1), i(2), i(3), i(4), i(5), i(6), pair(7), pair(9), pair(9), pair(11)};
}
