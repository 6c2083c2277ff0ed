// The weight's gradient as a product over pixels: (K x pixels) times (pixels x R S C).
#pragma once

#include <c10/util/BFloat16.h>

#include "capability.h"
#include "conv_shape.h"

namespace fastres::cpu {

template <typename T>
struct DirectWgradKernel {
  int64_t tile_rows, panel;  // of the largest tile, columns of all
  int64_t vector;            // channels of the input fill vectors
  int64_t scratch;           // values

  // Adds the products of some pixels of the output to a part of sums[K][R S C]: some tiles' rows,
  // the t-th of which has part_of(K, all, t), and some panels of columns.
  void (*run)(const ConvShape& shape, const T* grad_output, const T* input, Range pixels,
              Range tiles, Range panels, float* scratch, float* sums);
};

// Tiles that are packed at a time, of so many pixels, which are half of a second-level cache.
// Multiplied at a time are fewer pixels, a panel of which is in the first.
constexpr int64_t kWgradTiles = 20;
constexpr int64_t kWgradPacked = 512;
constexpr int64_t kWgradPixels = 256;

// The i-th of so many parts of nearly equal size: the rows of a tile, the tiles of a job.
constexpr Range part_of(int64_t size, int64_t parts, int64_t i) {
  return {size * i / parts, size * (i + 1) / parts};
}

FASTRES_DECLARE_KERNELS(DirectWgradKernel, direct_wgrad_kernel)

#if defined(FASTRES_X86)
namespace AVX512_BF16 {
template <typename T>
DirectWgradKernel<T> direct_wgrad_kernel();
}
#endif

}  // namespace fastres::cpu
