// Winograd convolution of 3x3 filters at stride 1.
#include "conv_plain_filters.h"
#include "conv_winograd.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// All channels of a tile into its rows [position][chunk][tile][16].
template <int height, int width, int m, typename T>
FASTRES_INLINE void gather_tile(const ConvShape& shape, const T* input, const Corner& corner,
                                int64_t count, float* rows, int64_t position_stride) {
  constexpr int kIn = Tiling<m, 3>::kIn;
  const auto pixels = input_tile<height, width, 3>(shape, input, corner);
  const int64_t channels = round_up(shape.c, kChunk);
  for (int64_t c = 0; c < channels; c += kVec) {
    float* const out = rows + c / kChunk * count * kChunk + c % kChunk;
    pixels.load(c, [&](const auto& load) FASTRES_INLINED {
      transform_input<height, width, 3>(load, [&](int y, int x, Vec value) FASTRES_INLINED {
        const int position = Tiling<height, 3>::place(y) * kIn + Tiling<width, 3>::place(x);
        value.store(out + position * position_stride);
      });
    });
  }
}

template <int m, typename Filters, typename T>
bool run_with(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
              float* scratch) {
  const auto gather = [&](const JobTiles& tiles, float* rows, int64_t position_stride) {
    for (int64_t row = 0; row < tiles.count; ++row, rows += kChunk) {
      const auto& corner = tiles.corners[row];
      with_size<m, 3>(corner.kind, [&]<int height, int width>() FASTRES_INLINED {
        gather_tile<height, width, m>(shape, operands.input, corner, tiles.count, rows,
                                      position_stride);
      });
    }
  };
  return run_winograd<m, 3, 1, Filters>(shape, operands, job, scratch, gather);
}

template <int m, typename T>
bool run(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
         float* scratch) {
  return run_with<m, TransformedFilters<m, 3, 1, T>>(shape, operands, job, scratch);
}

template <typename T>
bool run_plain(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
               float* scratch) {
  return run_with<4, PlainFilters<4, 3, 1>>(shape, operands, job, scratch);
}

}  // namespace

template <typename T>
WinogradKernels<T> winograd_kernels() {
  return {&run<2, T>, &run<4, T>, &run_plain<T>};
}

template WinogradKernels<float> winograd_kernels<float>();
template WinogradKernels<c10::BFloat16> winograd_kernels<c10::BFloat16>();
template WinogradKernels<c10::Half> winograd_kernels<c10::Half>();

}  // namespace fastres::cpu::CPU_CAPABILITY
