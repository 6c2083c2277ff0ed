// What the project's own convolutions are given: NHWC activations.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace fastres::cpu {

using Pair = std::array<int64_t, 2>;

// (N, H, W, C) activations, (K, C / groups, R, S) filters, (N, P, Q, K) output.
struct ConvShape {
  int64_t n, h, w, c;
  int64_t k, r, s;
  int64_t p, q;
  Pair stride, padding, dilation;
  int64_t groups = 1;

  int64_t pixels() const { return n * p * q; }
  int64_t taps() const { return r * s; }
};

// The same convolution with two neighbouring channels of bfloat16 in the place of one of float32.
inline ConvShape in_pairs(ConvShape shape) {
  shape.c /= 2;
  return shape;
}

// Chunks of 16 channels, a cache line of fp32, are what activations are packed in.
constexpr int64_t kChunk = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Kept free between the positions of a Winograd tile, which at multiples of 4 KB would all fall
// into one set of the cache.
constexpr int64_t kPositionSkew = 5 * kChunk;

// Pixels that the direct kernel lines the values of up, where channels are few or odd, before it
// reads the first again: what several stores wrote can be loaded once it is in the cache.
constexpr int64_t kLines = 16;

// Winograd tiles of a job at most: their rows and sums share the second-level cache.
constexpr int64_t kMostTiles = 32;

// F(m x m, r x r). At stride 2 the input's even and odd rows and columns are four phases, each
// convolved at stride 1 with every second tap of the filters (polyphase): r is half their size,
// rounded up. Filters being odd, an odd phase has a tap less, so that nothing of it meets the last
// row or column of positions, the point at infinity.
struct WinogradForm {
  int64_t m, r, stride;

  constexpr int64_t side() const { return m + r - 1; }
  constexpr int64_t positions() const { return side() * side(); }

  // Whether tiles may be a row or a column shorter: a tile of F(4, r) that is meets the same
  // filters at all of the points but the last but one.
  constexpr bool mixes() const { return m == 4; }

  // Of few channels, all phases fill one chunk together: [row's phase][column's][channel].
  constexpr bool shares_chunk(int64_t c) const { return stride == 2 && 4 * c <= kChunk; }

  // Channels of a chunk in use, a multiple of four.
  constexpr int64_t chunk_depth(int64_t c) const { return shares_chunk(c) ? 4 * c : kChunk; }

  // Phases at the i-th row or column of positions.
  constexpr int64_t phases(int64_t i) const { return stride == 2 && i + 1 < side() ? 2 : 1; }

  // Chunks that the product sums up at a position: [row's phase][column's][chunk of channels].
  constexpr int64_t chunks(int64_t c, int64_t position) const {
    if (shares_chunk(c)) return 1;
    return phases(position / side()) * phases(position % side()) * ceil_div(c, kChunk);
  }

  constexpr int64_t chunks(int64_t c) const {
    int64_t sum = 0;
    for (int64_t position = 0; position < positions(); ++position) sum += chunks(c, position);
    return sum;
  }

  constexpr int64_t depth(int64_t c) const { return chunks(c) * chunk_depth(c); }

  // One position's rows in memory, of `count` tiles.
  constexpr int64_t rows_stride(int64_t c, int64_t count) const {
    return chunks(c, 0) * count * kChunk + kPositionSkew;
  }
};

// Values of plain 3x3 filters, an output channel.
constexpr int64_t plain_depth(int64_t c) { return 9 * round_up(c, kChunk); }

// Tiles along one dimension of the output. Where they would reach over its end the last ones, as
// many as are needed, are one shorter if they may: 14 is 4 + 4 + 3 + 3, which saves a sixth of the
// multiplications.
struct TileAxis {
  int64_t m, count, shorter;

  TileAxis(int64_t size, const WinogradForm& form)
      : m(form.m),
        count(ceil_div(size, m)),
        shorter(form.mixes() ? std::min(m * count - size, count) : 0) {}

  bool is_shorter(int64_t i) const { return i >= count - shorter; }
  int64_t begin(int64_t i) const { return m * i - std::max(i - (count - shorter), int64_t{0}); }

  // Interpolation points of all of them.
  int64_t points(const WinogradForm& form) const { return count * form.side() - shorter; }
};

struct WinogradGrid {
  TileAxis rows, columns;

  WinogradGrid(const ConvShape& shape, const WinogradForm& form)
      : rows(shape.p, form), columns(shape.q, form) {}

  int64_t tiles(const ConvShape& shape) const { return shape.n * rows.count * columns.count; }

  // Products that are summed up, for every input and output channel.
  int64_t products(const ConvShape& shape, const WinogradForm& form) const {
    return shape.n * rows.points(form) * columns.points(form);
  }
};

// Of the output, up to which training leaves products of bfloat16 to the libraries. Measured on Zen
// 4: a block of 8 images' 1568 pixels takes 0.96 of eager's speed with the project's, 1.05 without.
constexpr int64_t kFewPixels = 2048;

// [begin, end)
struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// Some rows of a convolution's output (pixels, Winograd tiles or, of groups, rows of the maps) for
// some panels of its channels; `coming` are the rows that the same thread computes next.
struct ConvJob {
  Range rows, panels, coming{0, 0};
};

// (groups, K, C, R, S) filters anywhere in memory, K and C those of a group: in elements from one
// to the next. Where input and output channels are exchanged and the taps run backwards, they are
// those of the input's gradient.
struct FilterView {
  const float* data;
  int64_t k, c, r, s;
  int64_t k_stride, c_stride, r_stride, s_stride;
  int64_t groups = 1, group_stride = 0;
};

// y = act(conv(x) + bias + residual); `bias` and `residual` may be null.
template <typename T>
struct ConvOperands {
  const T* input;
  const float* weight;  // packed, see conv_pack.h
  const float* bias;    // K values
  const T* residual;    // as the output
  T* output;
  bool relu;
};

}  // namespace fastres::cpu
