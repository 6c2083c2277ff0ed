// The jobs of wgrad by Winograd.
#include "conv_outer.h"
#include "conv_wgrad_winograd.h"
#include "conv_winograd.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// Filters multiplied at once: two such tiles fill a row of kOuterRows values.
constexpr int64_t kRows = kOuterRows / 2;

// A dy A^T of one vector of filters, for a tile of so many rows and columns: load(y, x) gives the
// gradients, store(y, x, value) gets the transform's.
template <int rows, int columns, typename Load, typename Store>
FASTRES_INLINE void transform_gradient(const Load& load, const Store& store) {
  constexpr int kHeight = rows + 2, kWidth = columns + 2;
  Vec half[kHeight][columns];
#pragma GCC unroll 4
  for (int x = 0; x < columns; ++x) {
    Vec dy[rows], t[kHeight];
#pragma GCC unroll 4
    for (int y = 0; y < rows; ++y) dy[y] = load(y, x);
    Winograd<rows, 3>::transposed_output(dy, t);
#pragma GCC unroll 6
    for (int y = 0; y < kHeight; ++y) half[y][x] = t[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kHeight; ++y) {
    Vec t[kWidth];
    Winograd<columns, 3>::transposed_output(half[y], t);
#pragma GCC unroll 6
    for (int x = 0; x < kWidth; ++x) store(y, x, t[x]);
  }
}

// G^T t in one dimension, the i-th of three.
template <int m, int i>
FASTRES_INLINE Vec filter_sum(const Vec (&t)[m + 2]) {
  constexpr auto& kFilter = Winograd<m, 3>::kFilter;
  Vec sum(0.0f);
#pragma GCC unroll 6
  for (int j = 0; j < m + 2; ++j) {
    if (kFilter[j][i] == 0) continue;
    sum = at::vec::fmadd(Vec(static_cast<float>(kFilter[j][i])), t[j], sum);
  }
  return sum;
}

template <int m>
FASTRES_INLINE void filter_sums(const Vec (&t)[m + 2], Vec (&g)[3]) {
  g[0] = filter_sum<m, 0>(t);
  g[1] = filter_sum<m, 1>(t);
  g[2] = filter_sum<m, 2>(t);
}

// G^T t G of one vector of channels: load(y, x) gives the sums, store(r, s, value) gets the taps.
template <int m, typename Load, typename Store>
FASTRES_INLINE void transform_sums(const Load& load, const Store& store) {
  constexpr int kIn = m + 2;
  Vec half[3][kIn];
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x) {
    Vec t[kIn], g[3];
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) t[y] = load(y, x);
    filter_sums<m>(t, g);
#pragma GCC unroll 3
    for (int r = 0; r < 3; ++r) half[r][x] = g[r];
  }
#pragma GCC unroll 3
  for (int r = 0; r < 3; ++r) {
    Vec g[3];
    filter_sums<m>(half[r], g);
#pragma GCC unroll 3
    for (int s = 0; s < 3; ++s) store(r, s, g[s]);
  }
}

// A job's memory.
template <int64_t kPositions>
struct Buffers {
  static constexpr int64_t kTiles = kMostTiles, kFilters = WgradPart::kMostFilters;

  float* const memory;

  float* gradients(int64_t position, int64_t filter) const {
    return memory + position * WgradBuffers::kGradients +
           filter / kOuterRows * kOuterRows * kTiles + filter % kOuterRows;
  }
  float* pixels(int64_t position, int64_t channel) const {
    return memory + kPositions * WgradBuffers::kGradients + position * WgradBuffers::kPixels +
           channel / kPanel * kPanel * kTiles + channel % kPanel;
  }
  float* sums(int64_t position, int64_t filter, int64_t channel) const {
    return memory + kPositions * (WgradBuffers::kGradients + WgradBuffers::kPixels) +
           position * WgradBuffers::kSums + channel / kPanel * kPanel * kFilters + filter * kPanel +
           channel % kPanel;
  }
};

template <int m>
using BuffersOf = Buffers<Tiling<m, 3>::kPositions>;

template <int height, int width, int m>
constexpr int position_of(int y, int x) {
  return Tiling<height, 3>::place(y) * Tiling<m, 3>::kIn + Tiling<width, 3>::place(x);
}

// A tile's pixels and gradients into the buffers, as their tile-th.
template <int height, int width, int m, typename T, typename G>
FASTRES_INLINE void gather_tile(const ConvShape& shape, const WgradOperands<T, G>& operands,
                                const Corner& corner, const WgradPart& part,
                                const BuffersOf<m>& buffers, int64_t tile) {
  const auto pixels = input_tile<height, width, 3>(shape, operands.input, corner);
  for (int64_t c = 0; c < part.channels.size(); c += kVec) {
    float* const out = buffers.pixels(0, c) + tile * kPanel;
    pixels.load(part.channels.begin + c, [&](const auto& load) FASTRES_INLINED {
      transform_input<height, width, 3>(load, [&](int y, int x, Vec value) FASTRES_INLINED {
        value.store(out + position_of<height, width, m>(y, x) * WgradBuffers::kPixels);
      });
    });
  }
  const TilePixels<height, width, T> gradients(operands.grad_output, corner.n, shape.p, shape.q,
                                               shape.k, corner.p, corner.q);
  for (int64_t k = 0; k < part.filters.size(); k += kVec) {
    float* const out = buffers.gradients(0, k) + tile * kOuterRows;
    gradients.load(part.filters.begin + k, [&](const auto& load) FASTRES_INLINED {
      transform_gradient<height, width>(load, [&](int y, int x, Vec value) FASTRES_INLINED {
        value.store(out + position_of<height, width, m>(y, x) * WgradBuffers::kGradients);
      });
    });
  }
}

// What the next tiles are gathered from, fetched into the second-level cache while these are
// multiplied: at each of m x m positions one pixel of every tile.
template <typename T, typename G>
class NextTiles {
 public:
  NextTiles(const ConvShape& shape, const WgradOperands<T, G>& operands, const JobTiles& tiles,
            const WgradPart& part)
      : shape_(shape),
        tiles_(tiles),
        input_(operands.input + part.channels.begin),
        grad_output_(operands.grad_output + part.filters.begin),
        channels_(part.channels.size()),
        filters_(part.filters.size()) {}

  void prefetch(int64_t y, int64_t x, Range tiles) const {
    for (int64_t tile = tiles.begin; tile < std::min(tiles.end, tiles_.count); ++tile) {
      const Corner& at = tiles_.corners[tile];
      const int64_t row = at.p + y, column = at.q + x;
      fetch(input_, shape_.h, shape_.w, shape_.c, at.n, row, column, channels_);
      fetch(grad_output_, shape_.p, shape_.q, shape_.k, at.n, row, column, filters_);
    }
  }

 private:
  static void fetch(const T* maps, int64_t h, int64_t w, int64_t c, int64_t n, int64_t row,
                    int64_t column, int64_t values) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const T* const pixel =
        maps + ((n * h + std::min(row, h - 1)) * w + std::min(column, w - 1)) * c;
    for (int64_t i = 0; i < values; i += kLine) {
      __builtin_prefetch(pixel + i, /*write=*/0, /*locality=*/2);
    }
  }

  const ConvShape& shape_;
  const JobTiles& tiles_;
  const T *input_, *grad_output_;
  int64_t channels_, filters_;
};

// Adds the products of these tiles to the sums, which begin with the first.
template <int m, typename Next>
void multiply_tiles(const JobTiles& tiles, bool first, const WgradPart& part,
                    const BuffersOf<m>& buffers, const Next& next) {
  constexpr int kIn = Tiling<m, 3>::kIn;
  constexpr bool kMixed = WinogradForm{m, 3, 1}.mixes();
  const int64_t filters = part.filters.size(), channels = part.channels.size();
  const int64_t calls = ceil_div(channels, kPanel) * ceil_div(filters, kRows);
  for (int position = 0; position < Tiling<m, 3>::kPositions; ++position) {
    const int y = position / kIn, x = position % kIn;
    const auto having = tiles.having(kMixed && y == m, kMixed && x == m);
    if (first) std::fill_n(buffers.sums(position, 0, 0), WgradBuffers::kSums, 0.0f);
    int64_t call = 0;
    for (int64_t c = 0; c < channels; c += kPanel) {
      const float* const panel = buffers.pixels(position, c) + having.begin * kPanel;
      for (int64_t k = 0; k < filters; k += kRows, ++call) {
        if (y < m && x < m) {
          next.prefetch(y, x, {kMostTiles * call / calls, kMostTiles * (call + 1) / calls});
        }
        multiply_outer_rows<kRows>(std::min(kRows, filters - k),
                                   buffers.gradients(position, k) + having.begin * kOuterRows,
                                   panel, having.size(), {buffers.sums(position, k, c), kPanel});
      }
    }
  }
}

// The sums transformed to filters; false where one is not finite.
template <int m, typename G>
bool finish_part(const ConvShape& shape, G* gradient, const WgradPart& part,
                 const BuffersOf<m>& buffers) {
  const int64_t taps = shape.taps(), channels = shape.c;
  Vec checked(0.0f);
  for (int64_t row = 0; row < part.filters.size(); ++row) {
    G* const filter = gradient + (part.filters.begin + row) * taps * channels;
    for (int64_t lane = 0; lane < part.channels.size(); lane += kVec) {
      const int64_t c = part.channels.begin + lane, lanes = std::min(kVec, channels - c);
      const float* const sums = buffers.sums(0, row, lane);
      transform_sums<m>(
          [&](int y, int x) FASTRES_INLINED {
            return Vec::loadu(sums + (y * (m + 2) + x) * WgradBuffers::kSums);
          },
          [&](int r, int s, Vec value) FASTRES_INLINED {
            checked = at::vec::fmadd(value, Vec(0.0f), checked);
            store_vec(value, filter + (r * 3 + s) * channels + c, lanes);
          });
    }
  }
  return (checked == checked).zero_mask() == 0;
}

template <int m, typename T, typename G>
bool run(const ConvShape& shape, const WgradOperands<T, G>& operands, const WgradPart& part,
         float* scratch) {
  const WinogradGrid grid(shape, {m, 3, 1});
  const BuffersOf<m> buffers{scratch};
  const auto tiles_from = [&](int64_t first) {
    return JobTiles(grid, {first, std::min(first + kMostTiles, part.tiles.end)});
  };
  auto tiles = tiles_from(part.tiles.begin);
  for (int64_t first = part.tiles.begin; first < part.tiles.end; first += kMostTiles) {
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const auto& corner = tiles.corners[tile];
      with_size<m, 3>(corner.kind, [&]<int height, int width>() FASTRES_INLINED {
        gather_tile<height, width, m>(shape, operands, corner, part, buffers, tile);
      });
    }
    const auto following = tiles_from(std::min(first + kMostTiles, part.tiles.end));
    multiply_tiles<m>(tiles, first == part.tiles.begin, part, buffers,
                      NextTiles(shape, operands, following, part));
    tiles = following;
  }
  return finish_part<m>(shape, operands.gradient, part, buffers);
}

}  // namespace

template <typename T>
WinogradWgradKernels<T> winograd_wgrad_kernels() {
  return {&run<2, T, T>, &run<4, T, T>, &run<2, T, float>, &run<4, T, float>};
}

template WinogradWgradKernels<float> winograd_wgrad_kernels<float>();
template WinogradWgradKernels<c10::BFloat16> winograd_wgrad_kernels<c10::BFloat16>();

}  // namespace fastres::cpu::CPU_CAPABILITY
