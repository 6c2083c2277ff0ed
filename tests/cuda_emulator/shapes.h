// How a convolution comes through ctypes.
#pragma once

#include "../../csrc/cuda/conv_plan.h"

// n, h, w, c, k, r, s, then stride, padding and dilation as (h, w)
inline fastres::cuda::ConvShape shape_of(const int64_t* v) {
  const auto i = [&](int j) { return static_cast<int>(v[j]); };
  return {v[0], i(1), i(2), i(3), i(4), i(5), i(6), {i(7), i(8)}, {i(9), i(10)}, {i(11), i(12)}};
}
