// Winograd convolution: tiles of the input are transformed, multiplied position by position, and
// the sums of one panel of channels transformed back while they are in the cache.
#include "conv_kernels.h"
#include "conv_tile.h"
#include "winograd.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

template <int m>
struct Tiling {
  static constexpr int64_t kIn = m + 2;
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

// B^T d B of one vector of channels; load(y, x) gives the tile's values.
template <int m, typename Load>
FASTRES_INLINE void transform_input(const Load& load, float* out, int64_t position_stride) {
  constexpr int kIn = Tiling<m>::kIn;
  Vec half[kIn][kIn];
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x) {
    Vec d[kIn], t[kIn];
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) d[y] = load(y, x);
    Winograd<m>::input(d, t);
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) half[y][x] = t[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kIn; ++y) {
    Vec t[kIn];
    Winograd<m>::input(half[y], t);
#pragma GCC unroll 6
    for (int x = 0; x < kIn; ++x) t[x].store(out + (y * kIn + x) * position_stride);
  }
}

// A^T t A of one vector of channels; store(y, x, value) gets the tile's values.
template <int m, typename Store>
FASTRES_INLINE void transform_output(const float* in, int64_t position_stride, const Store& store) {
  constexpr int kIn = Tiling<m>::kIn;
  Vec half[m][kIn];
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x) {
    Vec t[kIn], y[m];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) t[i] = Vec::loadu(in + (i * kIn + x) * position_stride);
    Winograd<m>::output(t, y);
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) half[i][x] = y[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < m; ++i) {
    Vec y[m];
    Winograd<m>::output(half[i], y);
#pragma GCC unroll 4
    for (int j = 0; j < m; ++j) store(i, j, y[j]);
  }
}

// All channels of the tiles into rows [position][chunk][tile][16].
template <int m, typename T>
void gather_tiles(const ConvShape& shape, const WinogradGrid& grid, const T* input, Range tiles,
                  float* rows, int64_t position_stride) {
  constexpr int64_t kIn = Tiling<m>::kIn;
  const int64_t count = tiles.size();
  for (int64_t row = 0; row < count; ++row) {
    const Corner corner(grid, tiles.begin + row);
    const int64_t top = corner.p - shape.padding[0], left = corner.q - shape.padding[1];
    const T* const origin = input + ((corner.n * shape.h + top) * shape.w + left) * shape.c;
    const bool inner = top >= 0 && left >= 0 && top + kIn <= shape.h && left + kIn <= shape.w;
    for (int64_t c = 0; c < round_up(shape.c, kChunk); c += kVec) {
      float* const out = rows + (c / kChunk * count + row) * kChunk + c % kChunk;
      const int64_t lanes = std::max(shape.c - c, int64_t{0});
      if (inner && lanes >= kVec) {
        transform_input<m>(
            [&](int y, int x) { return load_vec(origin + (y * shape.w + x) * shape.c + c); }, out,
            position_stride);
      } else {
        transform_input<m>(
            [&](int y, int x) {
              const bool inside =
                  top + y >= 0 && top + y < shape.h && left + x >= 0 && left + x < shape.w;
              return inside ? load_vec(origin + (y * shape.w + x) * shape.c + c, lanes) : Vec(0.0f);
            },
            out, position_stride);
      }
    }
  }
}

// The rows of the input below these tiles, by and large what the next tiles need.
template <typename T>
Prefetch prefetch_tiles(const ConvShape& shape, const WinogradGrid& grid, const T* input,
                        Range tiles, int64_t steps) {
  const Corner corner(grid, tiles.end);
  const int64_t size = shape.n * shape.h * shape.w;
  const int64_t y = corner.p - shape.padding[0] + 2;
  const int64_t first = (corner.n * shape.h + y) * shape.w + corner.q;
  const auto at = [&](int64_t pixel) {
    return input + std::clamp(pixel, int64_t{0}, size) * shape.c;
  };
  return {at(first), at(first + tiles.size() * grid.m * grid.m), steps};
}

// Where the sums of a position go.
struct ToSums {
  float* sums;

  ToSums from(int64_t row) const { return {sums + row * kPanel}; }

  FASTRES_INLINE void prefetch(int64_t) const {}  // in the cache already

  FASTRES_INLINE void operator()(int64_t row, Vec left, Vec right) const {
    left.store(sums + row * kPanel);
    right.store(sums + row * kPanel + kVec);
  }
};

alignas(64) constexpr float kZeros[kPanel] = {};

template <int m, typename T>
bool run(const ConvShape& shape, const ConvOperands<T>& operands, Range tiles, Range panels,
         float* scratch) {
  constexpr int64_t kPositions = Tiling<m>::kPositions;
  const WinogradGrid grid(shape, m);
  const int64_t count = tiles.size(), chunks = ceil_div(shape.c, kChunk);
  const int64_t in_stride = chunks * count * kChunk + kPositionSkew,
                out_stride = count * kPanel + kPositionSkew;
  float* const sums = scratch + kPositions * in_stride;
  gather_tiles<m>(shape, grid, operands.input, tiles, scratch, in_stride);
  auto coming = prefetch_tiles(shape, grid, operands.input, tiles,
                               panels.size() * kPositions * tiles_of(count) * chunks);
  const auto finish = finish_of(operands);
  Vec checked(0.0f);  // becomes NaN with the first Inf or NaN
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const float* const weight = operands.weight + panel * kPositions * chunks * kChunk * kPanel;
    for (int64_t position = 0; position < kPositions; ++position) {
      const Panels in{scratch + position * in_stride, count * kChunk,
                      weight + position * chunks * kChunk * kPanel, chunks, kZeros};
      multiply_panel(count, in, coming, ToSums{sums + position * out_stride});
    }
    const int64_t channel = panel * kPanel;
    const Start bias(operands.bias, channel, shape.k);
    for (int64_t row = 0; row < count; ++row) {
      const Corner corner(grid, tiles.begin + row);
      const int64_t first =
          ((corner.n * shape.p + corner.p) * shape.q + corner.q) * shape.k + channel;
      const int64_t height = std::min<int64_t>(m, shape.p - corner.p);
      const int64_t width = std::min<int64_t>(m, shape.q - corner.q);
      for (int64_t lane = 0; lane < std::min(kPanel, shape.k - channel); lane += kVec) {
        const int64_t lanes = std::min(kVec, shape.k - channel - lane);
        const Vec shift = Vec::loadu(bias.value + lane);
        transform_output<m>(sums + row * kPanel + lane, out_stride,
                            [&](int y, int x, Vec sum) FASTRES_INLINED {
                              if (y >= height || x >= width) return;
                              checked = at::vec::fmadd(sum, Vec(0.0f), checked);
                              const int64_t to = first + lane + (y * shape.q + x) * shape.k;
                              const Vec scale(Winograd<m>::kScale[y] * Winograd<m>::kScale[x]);
                              store_vec(finish(at::vec::fmadd(sum, scale, shift), to, lanes),
                                        operands.output + to, lanes);
                            });
      }
    }
  }
  return (checked == checked).zero_mask() == 0;
}

}  // namespace

template <typename T>
WinogradKernels<T> winograd_kernels() {
  return {&run<2, T>, &run<4, T>};
}

template WinogradKernels<float> winograd_kernels<float>();
template WinogradKernels<c10::BFloat16> winograd_kernels<c10::BFloat16>();
template WinogradKernels<c10::Half> winograd_kernels<c10::Half>();

}  // namespace fastres::cpu::CPU_CAPABILITY
