// What Winograd's convolutions have in common: tiles of the input, transformed by the caller, are
// multiplied position by position, and the sums of one panel of channels transformed back while
// they are in the cache. Included by *_kernel.cpp only.
#pragma once

#include "conv_kernels.h"
#include "conv_tile.h"
#include "winograd.h"

namespace fastres::cpu::CPU_CAPABILITY {

template <int m, int r>
struct Tiling {
  static constexpr int kIn = m + r - 1;
  static constexpr int64_t kPositions = kIn * kIn;
};

// The tile's corner in the output.
struct Corner {
  int64_t n, p, q;

  Corner(const WinogradGrid& grid, int64_t tile)
      : n(tile / (grid.rows * grid.columns)),
        p(tile / grid.columns % grid.rows * grid.m),
        q(tile % grid.columns * grid.m) {}
};

// B^T d B of one vector of channels: load(y, x) gives the tile's values, store(y, x, value) gets
// the transform's.
template <int m, int r, typename Load, typename Store>
FASTRES_INLINE void transform_input(const Load& load, const Store& store) {
  constexpr int kIn = Tiling<m, r>::kIn;
  Vec half[kIn][kIn];
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x) {
    Vec d[kIn], t[kIn];
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) d[y] = load(y, x);
    Winograd<m, r>::input(d, t);
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) half[y][x] = t[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kIn; ++y) {
    Vec t[kIn];
    Winograd<m, r>::input(half[y], t);
#pragma GCC unroll 6
    for (int x = 0; x < kIn; ++x) store(y, x, t[x]);
  }
}

// A^T t A of one vector of channels; store(y, x, value) gets the tile's values.
template <int m, int r, typename Store>
FASTRES_INLINE void transform_output(const float* in, int64_t position_stride, const Store& store) {
  constexpr int kIn = Tiling<m, r>::kIn;
  Vec half[m][kIn];
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x) {
    Vec t[kIn], y[m];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) t[i] = Vec::loadu(in + (i * kIn + x) * position_stride);
    Winograd<m, r>::output(t, y);
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) half[i][x] = y[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < m; ++i) {
    Vec y[m];
    Winograd<m, r>::output(half[i], y);
#pragma GCC unroll 4
    for (int j = 0; j < m; ++j) store(i, j, y[j]);
  }
}

// The rows of the input below these tiles, by and large what the next tiles need.
template <typename T>
Prefetch prefetch_tiles(const ConvShape& shape, const WinogradGrid& grid, const T* input,
                        Range tiles, int64_t steps) {
  const Corner corner(grid, tiles.end);
  const int64_t size = shape.n * shape.h * shape.w;
  const int64_t y = corner.p * shape.stride[0] - shape.padding[0] + 2;
  const int64_t first = (corner.n * shape.h + y) * shape.w + corner.q * shape.stride[1];
  const int64_t pixels = tiles.size() * grid.m * grid.m * shape.stride[0] * shape.stride[1];
  const auto at = [&](int64_t pixel) {
    return input + std::clamp(pixel, int64_t{0}, size) * shape.c;
  };
  return {at(first), at(first + pixels), steps};
}

// Where the sums of a position go. Meanwhile what the transforms back will read and write is
// fetched: at each position one pixel of every tile, at the last ones nothing.
template <typename T>
struct ToSums {
  float* sums;
  const int64_t* corners;  // of the tiles in the output; null for nothing
  T* output;               // a tile's pixel, counted from its corner
  const T* residual;       // as the output, may be null

  ToSums from(int64_t row) const {
    return {sums + row * kPanel, corners == nullptr ? nullptr : corners + row, output, residual};
  }

  ToSums next_panel() const { return *this; }

  FASTRES_INLINE void prefetch(int64_t row) const {
    if (corners == nullptr) return;
    prefetch_panel<true>(output + corners[row]);
    if (residual != nullptr) prefetch_panel<false>(residual + corners[row]);
  }

  FASTRES_INLINE void operator()(int64_t row, Vec left, Vec right) const {
    left.store(sums + row * kPanel);
    right.store(sums + row * kPanel + kVec);
  }
};

alignas(64) inline constexpr float kZeros[kPanel] = {};

// The sums of one panel at the tiles, transformed back: false where one is not finite.
template <int m, int r, typename T>
bool finish_tiles(const ConvShape& shape, const ConvOperands<T>& operands, Range tiles,
                  int64_t channel, const float* sums, int64_t position_stride) {
  const WinogradGrid grid(shape, m);
  const auto finish = finish_of(operands);
  const Start bias(operands.bias, channel, shape.k);
  Vec checked(0.0f);  // becomes NaN with the first Inf or NaN
  for (int64_t row = 0; row < tiles.size(); ++row) {
    const Corner corner(grid, tiles.begin + row);
    const int64_t first =
        ((corner.n * shape.p + corner.p) * shape.q + corner.q) * shape.k + channel;
    const int64_t height = std::min<int64_t>(m, shape.p - corner.p);
    const int64_t width = std::min<int64_t>(m, shape.q - corner.q);
    for (int64_t lane = 0; lane < std::min(kPanel, shape.k - channel); lane += kVec) {
      const int64_t lanes = std::min(kVec, shape.k - channel - lane);
      const Vec shift = Vec::loadu(bias.value + lane);
      transform_output<m, r>(
          sums + row * kPanel + lane, position_stride, [&](int y, int x, Vec sum) FASTRES_INLINED {
            if (y >= height || x >= width) return;
            checked = at::vec::fmadd(sum, Vec(0.0f), checked);
            const int64_t to = first + lane + (y * shape.q + x) * shape.k;
            const Vec scale(Winograd<m, r>::kScale[y] * Winograd<m, r>::kScale[x]);
            store_vec(finish(at::vec::fmadd(sum, scale, shift), to, lanes), operands.output + to,
                      lanes);
          });
    }
  }
  return (checked == checked).zero_mask() == 0;
}

// gather(rows, position_stride) transforms the tiles of the input into rows
// [position][chunk][tile][16].
template <int m, int r, int stride, typename T, typename Gather>
bool run_winograd(const ConvShape& shape, const ConvOperands<T>& operands, Range tiles,
                  Range panels, float* scratch, const Gather& gather) {
  constexpr WinogradForm kForm{m, r, stride};
  constexpr int64_t kPositions = Tiling<m, r>::kPositions;
  const int64_t count = tiles.size(), depth = kForm.depth(shape.c);
  const int64_t in_stride = kForm.rows_stride(shape.c, count),
                out_stride = count * kPanel + kPositionSkew;
  float* const sums = scratch + kPositions * in_stride;
  gather(scratch, in_stride);
  const WinogradGrid grid(shape, m);
  auto coming = prefetch_tiles(shape, grid, operands.input, tiles,
                               panels.size() * tiles_of(count) * kForm.chunks(shape.c));
  // A tile of rows may reach over the end by less than its height.
  int64_t corners[kMostTiles + kTileRows] = {};
  for (int64_t row = 0; row < count; ++row) {
    const Corner at(grid, tiles.begin + row);
    corners[row] = ((at.n * shape.p + at.p) * shape.q + at.q) * shape.k;
  }
  bool finite = true;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const float* weight = operands.weight + panel * depth * kPanel;
    for (int64_t position = 0; position < kPositions; ++position) {
      const Panels in{scratch + position * in_stride,  count * kChunk, weight,
                      kForm.chunks(shape.c, position), kZeros,         kForm.chunk_depth(shape.c)};
      const int64_t pixel = (position / m * shape.q + position % m) * shape.k + panel * kPanel;
      const T* const residual = operands.residual == nullptr ? nullptr : operands.residual + pixel;
      const ToSums<T> to{sums + position * out_stride, position < m * m ? corners : nullptr,
                         operands.output + pixel, residual};
      multiply_panel(count, in, coming, to);
      weight += in.weights();
    }
    finite &= finish_tiles<m, r>(shape, operands, tiles, panel * kPanel, sums, out_stride);
  }
  return finite;
}

}  // namespace fastres::cpu::CPU_CAPABILITY
