// The microkernel of wgrad: the sum over pixels (or Winograd tiles) of the outer products of some
// channels of the output's gradient and a panel of channels of the input. Both lie as activations
// do, channels innermost, so that nothing is transposed. Included by *_kernel.cpp only.
#pragma once

#include "conv_tile.h"

namespace fastres::cpu::CPU_CAPABILITY {

// Values from one pixel's rows to the next: those of the largest tile, in whole vectors.
constexpr int64_t kOuterRows = round_up(kTileRows, kVec);

// Where the products are added up, a row of sums for every channel of the gradient. Of a panel's
// columns all exist, or the first vector.
struct OuterSums {
  float* data;
  int64_t stride;
  bool whole = true;
};

// sums[row][column] += sum over `count` pixels of rows[pixel][row] * panel[pixel][column]. In the
// build for products of bfloat16 values, two pixels' values lie where there was one of float32.
template <int kRows>
__attribute__((noinline)) void multiply_outer(const float* rows, const float* panel, int64_t count,
                                              const OuterSums& sums) {
  Accumulators<kRows> tile(Vec(0.0f), Vec(0.0f));
  for (int64_t i = 0; i < count; ++i, rows += kOuterRows, panel += kPanel) {
    tile.template add<1>(rows, Vec::loadu(panel), Vec::loadu(panel + kVec));
  }
  const OuterSums to = sums;
  tile.for_each_row([&](int64_t row, Vec left, Vec right) FASTRES_INLINED {
    float* const sum = to.data + row * to.stride;
    (Vec::loadu(sum) + left).store(sum);
    if (to.whole) (Vec::loadu(sum + kVec) + right).store(sum + kVec);
  });
}

template <int kRows = kTileRows>
inline void multiply_outer_rows(int64_t height, const float* rows, const float* panel,
                                int64_t count, const OuterSums& sums) {
  if (height == kRows) {
    multiply_outer<kRows>(rows, panel, count, sums);
  } else if constexpr (kRows > 1) {
    multiply_outer_rows<kRows - 1>(height, rows, panel, count, sums);
  }
}

}  // namespace fastres::cpu::CPU_CAPABILITY
