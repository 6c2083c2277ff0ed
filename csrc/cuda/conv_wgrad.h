// The gradient of a convolution's filters: how it is cut and launched; free of torch and of device
// code.
#pragma once

#include <algorithm>

#include "bn_relu.h"
#include "conv_plan.h"

namespace fastres::cuda {

// As a matrix product: a row for every channel of every tap, a column for every filter, the sum
// over output pixels. Rows come in blocks of 64 channels of a tap. A block of threads has a tile of
// two of these x tile_k filters and a share of the pixels; the shares are summed in their order by
// a second kernel.
struct WgradTiles {
  static constexpr int kPixels = 64;  // of a step
  static constexpr int kChannels = 64;

  int tile_k, filters;  // and tiles of them
  int channels, rows;   // blocks of a tap's channels, of all taps'
  int shares, steps;    // of a share, steps at most

  static WgradTiles of(const ConvShape& shape, int multiprocessors) {
    WgradTiles best{};
    double least = INFINITY;
    const int64_t all = ceil_div(shape.pixels(), kPixels);
    for (int tile_k : {256, 128, 64}) {
      WgradTiles t = cut(shape, tile_k);
      for (int round = 1; round <= 4; ++round) {
        // As many shares as so many rounds of blocks can have, but worth their sum.
        const int64_t wanted = std::clamp<int64_t>(round * multiprocessors / t.tiles(), 1,
                                                   std::max<int64_t>(all / 8, 1));
        t.steps = static_cast<int>(ceil_div(all, wanted));
        t.shares = static_cast<int>(ceil_div(all, t.steps));
        const double cost = t.cost(shape, multiprocessors);
        if (cost < least) best = t, least = cost;
      }
    }
    return best;
  }

  __host__ __device__ int pairs() const { return (rows + 1) / 2; }
  __host__ __device__ int tiles() const { return filters * pairs(); }
  __host__ __device__ int blocks() const { return tiles() * shares; }

  // First filter of a block, its share of the pixels.
  __host__ __device__ int filter(int block) const { return block % filters * tile_k; }
  __host__ __device__ int share(int block) const { return block / tiles(); }

  // The block of rows of its first or second half; the last may not exist.
  __host__ __device__ int row(int block, int half) const {
    return block / filters % pairs() * 2 + half;
  }
  __host__ __device__ int tap(int row) const { return row / channels; }
  __host__ __device__ int channel(int row) const { return row % channels * kChannels; }

 private:
  static WgradTiles cut(const ConvShape& shape, int tile_k) {
    WgradTiles t{};
    t.tile_k = tile_k;
    t.filters = static_cast<int>(ceil_div(shape.k, tile_k));
    t.channels = static_cast<int>(ceil_div(shape.c, kChannels));
    t.rows = shape.r * shape.s * t.channels;
    return t;
  }

  // Nanoseconds, about, by what moves: a multiprocessor gets 55 bytes of the cache in one and
  // writes 33 to memory, all together read 4000; a block begins in a microsecond. Estimates from
  // what is published of the H100, not measured.
  double cost(const ConvShape& shape, int multiprocessors) const {
    const double step = (2 * kChannels + tile_k) * kPixels * 2 / 55.;
    const double block = 1000 + 2 * kChannels * tile_k * 4 / 33. + steps * step;
    const double sums = 4. * shares * shape.k * shape.r * shape.s * shape.c / 4000;
    return double(ceil_div(blocks(), multiprocessors)) * block + sums;
  }
};

inline bool wgrad_takes_prologue(const ConvShape& shape, int multiprocessors) {
  const auto t = WgradTiles::of(shape, multiprocessors);
  const int64_t steps = t.tiles() * ceil_div(shape.pixels(), WgradTiles::kPixels);
  const int instructions = shape.is_padded() ? 580 : 360;  // which pixels are padding, too
  return prologue_pays(shape, steps, t.tile_k, instructions, multiprocessors);
}

// The arrays of one call, all on one device: activations dense in channels_last. `partial` has room
// for shares * K * R * S * C values; `grad_filter` (K, R, S, C). With a prologue, C values, the
// convolution's input is relu(batch_norm(input)).
struct ConvWgrad {
  const void *grad_output, *input;
  float* partial;
  void* grad_filter;
  Vectors<float> prologue = {};
};

// In conv_wgrad.cu: of a convolution whose shape fits_im2col(), in bfloat16 or float16, on sm_90.
void launch_conv_wgrad(cudaStream_t stream, bool bfloat16, const ConvShape& shape,
                       const ConvWgrad& w, int multiprocessors);

}  // namespace fastres::cuda
