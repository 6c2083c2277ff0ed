// The windows of a max-pool.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "conv_shape.h"

namespace fastres::cpu {

// Without dilation; a window lies in its map by half at least.
struct MaxPool {
  Pair kernel, stride, padding;

  // Of a map of so many rows (d = 0) or columns (1), rounded down.
  int64_t output_size(int d, int64_t pixels) const {
    return (pixels + 2 * padding[d] - kernel[d]) / stride[d] + 1;
  }

  std::array<int64_t, 4> output_size(const std::array<int64_t, 4>& size) const {
    return {size[0], size[1], output_size(0, size[2]), output_size(1, size[3])};
  }

  // What the i-th window covers of them.
  Range window(int d, int64_t i, int64_t pixels) const {
    const int64_t first = i * stride[d] - padding[d];
    return {std::max(first, int64_t{0}), std::min(first + kernel[d], pixels)};
  }
};

}  // namespace fastres::cpu
