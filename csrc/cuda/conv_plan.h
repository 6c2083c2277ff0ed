// The convolution kernels' arithmetic of shapes and tiles: plain C++, for host, device and tests.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bn_relu_plan.h"

namespace fastres::cuda {

struct Pair {
  int h, w;
};

// (N, H, W, C) activations, (K, R, S, C) filters, (N, P, Q, K) output; one group. The padding
// before the first row and column and that behind the last may differ, and cut off where negative.
struct ConvShape {
  int64_t n;
  int h, w, c, k, r, s;
  Pair stride, padding, padding_end, dilation;

  __host__ __device__ int reach_h() const { return dilation.h * (r - 1); }
  __host__ __device__ int reach_w() const { return dilation.w * (s - 1); }
  __host__ __device__ int p() const {
    return (h + padding.h + padding_end.h - reach_h() - 1) / stride.h + 1;
  }
  __host__ __device__ int q() const {
    return (w + padding.w + padding_end.w - reach_w() - 1) / stride.w + 1;
  }
  __host__ __device__ int64_t pixels() const { return n * p() * q(); }
  // Whether a window may reach beyond the input.
  __host__ __device__ bool is_padded() const {
    return padding.h > 0 || padding.w > 0 || padding_end.h > 0 || padding_end.w > 0;
  }
};

// Where output pixels lie in their array, counted in pixels: one behind the other (`dense`), or on
// a grid with gaps, where several convolutions fill one array.
struct PixelGrid {
  bool dense;
  int64_t first, across, down, image;

  static PixelGrid whole() { return {true, 0, 0, 0, 0}; }

  __host__ __device__ int64_t operator()(const ConvShape& shape, int64_t pixel) const {
    if (dense) return pixel;
    const int q = shape.q(), map = shape.p() * q, in_map = static_cast<int>(pixel % map);
    return first + pixel / map * image + in_map / q * down + in_map % q * across;
  }
};

// The convolution as a matrix product: a row for every output pixel, a column for every filter.
// Tiles of kTileM x tile_k are numbered filters first: neighbours share their input. In pairs, two
// tiles below each other have neighbouring numbers: they share their filters. The second of a pair
// may lie below the last row.
struct ConvTiles {
  static constexpr int kTileM = 128;
  static constexpr int kChunk = 64;  // input channels of a step: 128 bytes, a swizzled row

  int tile_k, down, across, paired;  // 0 or 1

  static ConvTiles of(const ConvShape& shape, int tile_k, bool paired = false) {
    return {tile_k, static_cast<int>(ceil_div(shape.pixels(), kTileM)),
            static_cast<int>(ceil_div(shape.k, tile_k)), paired};
  }

  __host__ __device__ int count() const { return (down + (down & paired)) * across; }

  __host__ __device__ int row(int tile) const {
    return ((tile >> paired) / across << paired) + (tile & paired);
  }

  // First output pixel and filter of a tile.
  __host__ __device__ int pixel(int tile) const { return row(tile) * kTileM; }
  __host__ __device__ int filter(int tile) const { return (tile >> paired) % across * tile_k; }

  // Output pixels of a tile.
  __host__ __device__ int rows(const ConvShape& shape, int tile) const {
    const int64_t left = shape.pixels() - pixel(tile);
    return left < 0 ? 0 : left < kTileM ? static_cast<int>(left) : kTileM;
  }
};

// Where the window of an output pixel begins in the input.
struct Window {
  int n, h, w;
};

__host__ __device__ inline Window window_of(const ConvShape& shape, int pixel) {
  const int q = shape.q(), map = shape.p() * q;
  return {pixel / map, pixel % map / q * shape.stride.h - shape.padding.h,
          pixel % q * shape.stride.w - shape.padding.w};
}

// Steps of the sum over filter taps and input channels.
__host__ __device__ inline int steps_of(const ConvShape& shape) {
  return shape.r * shape.s * static_cast<int>(ceil_div(shape.c, ConvTiles::kChunk));
}

// Something to compute, whole 16-byte packs of channels, pixels that 32 bits can count.
inline bool fits_packs(const ConvShape& s) {
  return s.c % 8 == 0 && s.k % 8 == 0 && s.c > 0 && s.k > 0 && s.r > 0 && s.s > 0 && s.n > 0 &&
         s.p() > 0 && s.q() > 0 && s.pixels() <= INT32_MAX - 2 * ConvTiles::kTileM;
}

// What the tensor maps of the im2col kind can say besides: corners of a signed and offsets of an
// unsigned byte.
inline bool fits_im2col(const ConvShape& s) {
  const auto byte = [](int corner) { return corner >= -128 && corner <= 127; };
  return fits_packs(s) && byte(-s.padding.h) && byte(-s.padding.w) &&
         byte(s.padding_end.h - s.reach_h()) && byte(s.padding_end.w - s.reach_w()) &&
         s.reach_h() < 256 && s.reach_w() < 256 && s.stride.h <= 8 && s.stride.w <= 8;
}

// Whether the tiles of sm_90's kernel come in pairs, each of which loads half of the filters for
// both: by what is published of the H100 a multiprocessor gets less of the cache than its tensor
// cores could use. Not measured.
constexpr bool are_paired(int tile_k) { return tile_k > 64; }

// Filters of a tile, `most` or less: those with which the multiprocessors, that compute a tile at a
// time, have to load the least. Wide tiles share more of the input, narrow ones waste less of the
// last round. `pairs`: where they come in pairs.
inline int choose_tile_k(const ConvShape& s, int multiprocessors, int most, bool pairs) {
  int best = 64;
  int64_t least = INT64_MAX;
  for (int tile : {64, 128, 256}) {
    const bool paired = pairs && are_paired(tile);
    const int64_t rounds = ceil_div(ConvTiles::of(s, tile, paired).count(), multiprocessors);
    const int64_t cost = rounds * (ConvTiles::kTileM + (paired ? tile / 2 : tile));
    if (tile <= most && cost < least) best = tile, least = cost;
  }
  return best;
}

// --- the prologue ---

// Channels of a batch norm before a convolution at most, and their room in shared memory.
constexpr int kMostNormalised = 1024;
__host__ __device__ constexpr size_t norm_bytes(int channels) {
  return 3 * sizeof(float) * channels;
}

// Whether on sm_90 the prologue costs less than batch norm and ReLU in a pass of their own, given
// the steps of all tiles of tile_k together, and the instructions that the warps that multiply
// issue for a step with its prologue: counted in the compiled kernels. Nanoseconds, by what is
// published of the H100, not measured: of these warps a scheduler has two, and 1.7 cycles; a step's
// products take the tensor cores 2.2 for each filter; memory gives 4000 bytes. So 1x1, which memory
// limits, has a prologue; 3x3, which would normalise everything nine times, has none.
inline bool prologue_pays(const ConvShape& s, int64_t steps, int tile_k, int instructions,
                          int multiprocessors) {
  constexpr double kFilter = 2.2, kBandwidth = 4000;
  if (s.c > kMostNormalised) return false;
  const double input = 2. * s.n * s.h * s.w * s.c, output = 2. * s.pixels() * s.k;
  const double each = double(steps) / multiprocessors, issued = each * instructions * 2 / 1.7;
  const double alone = std::max((input + output) / kBandwidth, each * tile_k * kFilter);
  return std::max(alone, issued) <= alone + 2 * input / kBandwidth;
}

inline bool fprop_takes_prologue(const ConvShape& s, int tile_k, int multiprocessors) {
  const int64_t tiles = ConvTiles::of(s, tile_k).count();
  return prologue_pays(s, tiles * steps_of(s), tile_k, 300, multiprocessors);
}

// --- few tiles ---

constexpr int kSplitTileK = 64;

// A part of the sum: the steps of one of the blocks that a tile is split between.
struct SplitSteps {
  int first, last;

  __host__ __device__ static SplitSteps of(const ConvShape& shape, int share, int shares) {
    const int all = steps_of(shape);
    return {all * share / shares, all * (share + 1) / shares};
  }
};

// Between how many blocks, a cluster, each tile of kSplitTileK filters is split where there are
// fewer tiles than multiprocessors; 0 where there are more. That blocks meet, and add up what they
// have, is taken to last as long as two steps: not measured.
inline int split_shares(const ConvShape& s, int multiprocessors) {
  constexpr int kMost = 8, kMeeting = 2;
  const int tiles = ConvTiles::of(s, kSplitTileK).count(), steps = steps_of(s);
  if (tiles > multiprocessors) return 0;
  int best = 1, least = steps;
  for (int shares = 2; shares <= kMost && shares * tiles <= multiprocessors; shares *= 2) {
    const int cost = static_cast<int>(ceil_div(steps, shares)) + kMeeting;
    if (shares <= steps && cost < least) best = shares, least = cost;
  }
  return best;
}

}  // namespace fastres::cuda
