// The gradient of a convolution's filters: how it is cut and launched; free of torch and of device
// code.
#pragma once

#include <algorithm>

#include "conv_plan.h"

namespace fastres::cuda {

// As a matrix product: a row for every filter, a column for every channel of a tap, the sum over
// output pixels. A block has a tile of 128 filters x tile_c channels of one tap and a share of the
// pixels; the shares are summed in their order by a second kernel.
struct WgradTiles {
  static constexpr int kTileK = 128;
  static constexpr int kPixels = 64;  // of a step

  int tile_c, filters, channels, taps;  // numbers of tiles
  int shares, steps;                    // of a share, steps at most

  static WgradTiles of(const ConvShape& shape, int multiprocessors) {
    WgradTiles t{};
    t.tile_c = shape.c > 64 ? 128 : 64;
    t.filters = static_cast<int>(ceil_div(shape.k, kTileK));
    t.channels = static_cast<int>(ceil_div(shape.c, t.tile_c));
    t.taps = shape.r * shape.s;
    const int64_t all = ceil_div(shape.pixels(), kPixels);
    // As many shares as fill the chip once, but steps enough that a share is worth its sum.
    constexpr int64_t kFewest = 8;
    const int64_t wanted =
        std::clamp<int64_t>(multiprocessors / t.tiles(), 1, std::max<int64_t>(all / kFewest, 1));
    t.steps = static_cast<int>(ceil_div(all, wanted));
    t.shares = static_cast<int>(ceil_div(all, t.steps));
    return t;
  }

  __host__ __device__ int tiles() const { return filters * channels * taps; }
  __host__ __device__ int blocks() const { return tiles() * shares; }

  // First filter, tap and first channel of a block, its share of the pixels.
  __host__ __device__ int filter(int block) const { return block % filters * kTileK; }
  __host__ __device__ int channel(int block) const { return block / filters % channels * tile_c; }
  __host__ __device__ int tap(int block) const { return block / filters / channels % taps; }
  __host__ __device__ int share(int block) const { return block / tiles(); }
};

// The arrays of one call, all on one device: activations dense in channels_last. `partial` has room
// for shares * K * R * S * C values; `grad_filter` (K, R, S, C).
struct ConvWgrad {
  const void *grad_output, *input;
  float* partial;
  void* grad_filter;
};

// In conv_wgrad.cu: of a convolution whose shape fits_im2col(), in bfloat16 or float16, on sm_90.
void launch_conv_wgrad(cudaStream_t stream, bool bfloat16, const ConvShape& shape,
                       const ConvWgrad& w, int multiprocessors);

}  // namespace fastres::cuda
