// wgrad of 3x3 filters at stride 1 by Winograd: the transposition of F(m x m, 3 x 3),
//
//   dg = G^T (sum over tiles of (A dy A^T) * (B^T d B)) G,
//
// which convolves every tile of m x m gradients with the input below it. At each of (m + 2)^2
// positions the sum is a product of matrices (filters x tiles) (tiles x channels).
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "capability.h"
#include "conv_shape.h"

namespace fastres::cpu {

// One job: the sums of some filters' and channels' gradients over some tiles. Its sums and what a
// few tiles are transformed into share the second-level cache.
struct WgradPart {
  static constexpr int64_t kMostFilters = 64, kMostChannels = 64;

  Range filters, channels, tiles;
};

// Where a job keeps what belongs to one position: gradients
// [filters / rows of the microkernel][tile][those rows], pixels [channels / panel][tile][panel] and
// sums [channels / panel][filter][panel], of the largest job.
struct WgradBuffers {
  static constexpr int64_t kGradients = WgradPart::kMostFilters * kMostTiles + kPositionSkew;
  static constexpr int64_t kPixels = WgradPart::kMostChannels * kMostTiles + kPositionSkew;
  static constexpr int64_t kSums =
      WgradPart::kMostFilters * WgradPart::kMostChannels + kPositionSkew;

  static constexpr int64_t values(int64_t positions) {
    return positions * (kGradients + kPixels + kSums);
  }
};

// The jobs of a gradient. They do not depend on the threads that there are, so that those have no
// say in how the sums are rounded.
struct WgradParts {
  int64_t filters, channels, tiles;     // all of them
  int64_t filter_parts, channel_parts;  // blocks of them
  int64_t splits;                       // of the tiles: what each gives is added up

  WgradParts(const ConvShape& shape, int64_t m)
      : filters(shape.k),
        channels(shape.c),
        tiles(WinogradGrid(shape, {m, 3, 1}).tiles(shape)),
        filter_parts(ceil_div(filters, WgradPart::kMostFilters)),
        channel_parts(ceil_div(channels, WgradPart::kMostChannels)),
        splits(splits_of(ceil_div(tiles, kMostTiles), filter_parts * channel_parts)) {}

  int64_t count() const { return filter_parts * channel_parts * splits; }
  int64_t split_of(int64_t job) const { return job / (filter_parts * channel_parts); }

  WgradPart operator[](int64_t job) const {
    const int64_t block = job % (filter_parts * channel_parts);
    const int64_t split = split_of(job);
    return {block_of(filters, WgradPart::kMostFilters, block / channel_parts),
            block_of(channels, WgradPart::kMostChannels, block % channel_parts), tiles_of(split)};
  }

  // Whole groups of kMostTiles, but for the last.
  Range tiles_of(int64_t split) const {
    const int64_t groups = ceil_div(tiles, kMostTiles);
    return {groups * split / splits * kMostTiles,
            std::min(groups * (split + 1) / splits * kMostTiles, tiles)};
  }

  // A job's tiles must be worth the transformation of its sums: a few threads shall have something
  // to do also where that costs a little, many only where it is nothing. A power of two, as threads
  // often are.
  static int64_t splits_of(int64_t groups, int64_t blocks) {
    const int64_t few = std::min(ceil_div(16, blocks), groups / 2);
    const int64_t many = std::min(ceil_div(64, blocks), groups / 16);
    return static_cast<int64_t>(
        std::bit_floor(static_cast<uint64_t>(std::max({few, many, int64_t{1}}))));
  }

  static Range block_of(int64_t total, int64_t most, int64_t i) {
    return {i * most, std::min((i + 1) * most, total)};
  }
};

template <typename T, typename Gradient>
struct WgradOperands {
  const T *input, *grad_output;  // NHWC
  Gradient* gradient;            // KRSC, of some tiles only
};

// False where a sum was not finite: transforms spread Inf and NaN over the taps.
template <typename T, typename Gradient>
using WinogradWgradJob = bool(const ConvShape& shape, const WgradOperands<T, Gradient>& operands,
                              const WgradPart& part, float* scratch);

template <typename T>
struct WinogradWgradKernels {
  WinogradWgradJob<T, T>*f2, *f4;                      // all tiles
  WinogradWgradJob<T, float>*f2_partial, *f4_partial;  // some of them
};

FASTRES_DECLARE_KERNELS(WinogradWgradKernels, winograd_wgrad_kernels)

bool can_compute_winograd_wgrad(const ConvShape& shape);

// The m that it is fastest with, 0 where the libraries' convolution is: `bf16` for operands of that
// type.
int64_t choose_winograd_wgrad(const ConvShape& shape, bool bf16);

// On torch's threads. False, and nothing of use in the gradient, where a sum was not finite.
template <typename T>
bool run_winograd_wgrad(const ConvShape& shape, int64_t m, const WgradOperands<T, T>& operands);

}  // namespace fastres::cpu
