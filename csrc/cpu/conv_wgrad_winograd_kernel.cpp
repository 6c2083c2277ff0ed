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

// A job's memory: transformed gradients [position][filters / kOuterRows][tile][kOuterRows],
// transformed input [position][channels / kPanel][tile][kPanel] and sums
// [position][channels / kPanel][filter][kPanel], from one position to the next so many values.
struct Buffers {
  int64_t filters, channels;  // whole rows and panels
  int64_t gradients_stride, pixels_stride, sums_stride;
  float *gradients, *pixels, *sums;

  Buffers(const WgradPart& part, int64_t positions, float* memory)
      : filters(round_up(part.filters.size(), kOuterRows)),
        channels(round_up(part.channels.size(), kPanel)),
        gradients_stride(filters * kMostTiles + kPositionSkew),
        pixels_stride(channels * kMostTiles + kPositionSkew),
        sums_stride(filters * channels + kPositionSkew),
        gradients(memory),
        pixels(gradients + positions * gradients_stride),
        sums(pixels + positions * pixels_stride) {}
};

template <int height, int width, int m, typename T>
FASTRES_INLINE void gather_pixels(const ConvShape& shape, const T* input, const Corner& corner,
                                  const WgradPart& part, const Buffers& buffers, int64_t tile) {
  for (int64_t c = 0; c < buffers.channels; c += kVec) {
    float* const out =
        buffers.pixels + c / kPanel * kMostTiles * kPanel + tile * kPanel + c % kPanel;
    transform_pixels<height, width, 3>(shape, input, corner, part.channels.begin + c,
                                       [&](int y, int x, Vec value) FASTRES_INLINED {
                                         const int position =
                                             Tiling<height, 3>::place(y) * Tiling<m, 3>::kIn +
                                             Tiling<width, 3>::place(x);
                                         value.store(out + position * buffers.pixels_stride);
                                       });
  }
}

template <int height, int width, int m, typename T>
FASTRES_INLINE void gather_gradients(const ConvShape& shape, const T* grad_output,
                                     const Corner& corner, const WgradPart& part,
                                     const Buffers& buffers, int64_t tile) {
  const T* const origin =
      grad_output + ((corner.n * shape.p + corner.p) * shape.q + corner.q) * shape.k;
  const bool inner = corner.p + height <= shape.p && corner.q + width <= shape.q;
  for (int64_t row = 0; row < buffers.filters; row += kVec) {
    const int64_t k = part.filters.begin + row, lanes = std::max(shape.k - k, int64_t{0});
    float* const out = buffers.gradients + row / kOuterRows * kMostTiles * kOuterRows +
                       tile * kOuterRows + row % kOuterRows;
    const auto store = [&](int y, int x, Vec value) FASTRES_INLINED {
      const int position =
          Tiling<height, 3>::place(y) * Tiling<m, 3>::kIn + Tiling<width, 3>::place(x);
      value.store(out + position * buffers.gradients_stride);
    };
    if (inner && lanes >= kVec) {
      transform_gradient<height, width>(
          [&](int y, int x) { return load_vec(origin + (y * shape.q + x) * shape.k + k); }, store);
    } else {
      transform_gradient<height, width>(
          [&](int y, int x) {
            const bool inside = corner.p + y < shape.p && corner.q + x < shape.q;
            return inside ? load_vec(origin + (y * shape.q + x) * shape.k + k, lanes) : Vec(0.0f);
          },
          store);
    }
  }
}

// Adds the products of these tiles to the sums.
template <int m>
void multiply_tiles(const JobTiles& tiles, const WgradPart& part, const Buffers& buffers) {
  constexpr int kIn = Tiling<m, 3>::kIn;
  for (int position = 0; position < Tiling<m, 3>::kPositions; ++position) {
    constexpr bool kMixed = WinogradForm{m, 3, 1}.mixes();
    const auto having = tiles.having(kMixed && position / kIn == m, kMixed && position % kIn == m);
    const float* const gradients = buffers.gradients + position * buffers.gradients_stride;
    const float* const pixels = buffers.pixels + position * buffers.pixels_stride;
    float* const sums = buffers.sums + position * buffers.sums_stride;
    for (int64_t c = 0; c < buffers.channels; c += kPanel) {
      const float* const panel = pixels + c * kMostTiles + having.begin * kPanel;
      for (int64_t row = 0; row < part.filters.size(); row += kRows) {
        const float* const rows = gradients + row / kOuterRows * kMostTiles * kOuterRows +
                                  having.begin * kOuterRows + row % kOuterRows;
        multiply_outer<kRows>(std::min(kRows, part.filters.size() - row), rows, panel,
                              having.size(), sums + c * buffers.filters + row * kPanel);
      }
    }
  }
}

// The sums transformed to filters; false where one is not finite.
template <int m, typename Gradient>
bool finish_part(const ConvShape& shape, Gradient* gradient, const WgradPart& part,
                 const Buffers& buffers) {
  Vec checked(0.0f);
  for (int64_t row = 0; row < part.filters.size(); ++row) {
    Gradient* const filter = gradient + (part.filters.begin + row) * 9 * shape.c;
    for (int64_t lane = 0; lane < part.channels.size(); lane += kVec) {
      const int64_t c = part.channels.begin + lane, lanes = std::min(kVec, shape.c - c);
      const float* const sums =
          buffers.sums + (lane / kPanel * buffers.filters + row) * kPanel + lane % kPanel;
      transform_sums<m>(
          [&](int y, int x) { return Vec::loadu(sums + (y * (m + 2) + x) * buffers.sums_stride); },
          [&](int r, int s, Vec value) FASTRES_INLINED {
            checked = at::vec::fmadd(value, Vec(0.0f), checked);
            store_vec(value, filter + (r * 3 + s) * shape.c + c, lanes);
          });
    }
  }
  return (checked == checked).zero_mask() == 0;
}

template <int m, typename T, typename Gradient>
bool run(const ConvShape& shape, const WgradOperands<T, Gradient>& operands, const WgradPart& part,
         float* scratch) {
  constexpr int64_t kPositions = Tiling<m, 3>::kPositions;
  const WinogradGrid grid(shape, {m, 3, 1});
  const Buffers buffers(part, kPositions, scratch);
  std::fill_n(buffers.sums, kPositions * buffers.sums_stride, 0.0f);
  for (int64_t first = part.tiles.begin; first < part.tiles.end; first += kMostTiles) {
    const JobTiles tiles(grid, {first, std::min(first + kMostTiles, part.tiles.end)});
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const auto& corner = tiles.corners[tile];
      with_size<m, 3>(corner.kind, [&]<int height, int width>() FASTRES_INLINED {
        gather_pixels<height, width, m>(shape, operands.input, corner, part, buffers, tile);
        gather_gradients<height, width, m>(shape, operands.grad_output, corner, part, buffers,
                                           tile);
      });
    }
    multiply_tiles<m>(tiles, part, buffers);
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
