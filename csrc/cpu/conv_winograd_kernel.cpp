// Winograd convolution of 3x3 filters at stride 1.
#include "conv_winograd.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// All channels of the tiles into rows [position][chunk][tile][16].
template <int m, typename T>
void gather_tiles(const ConvShape& shape, const T* input, Range tiles, float* rows,
                  int64_t position_stride) {
  constexpr int kIn = Tiling<m, 3>::kIn;
  const WinogradGrid grid(shape, m);
  const int64_t count = tiles.size();
  for (int64_t row = 0; row < count; ++row) {
    const Corner corner(grid, tiles.begin + row);
    const int64_t top = corner.p - shape.padding[0], left = corner.q - shape.padding[1];
    const T* const origin = input + ((corner.n * shape.h + top) * shape.w + left) * shape.c;
    const bool inner = top >= 0 && left >= 0 && top + kIn <= shape.h && left + kIn <= shape.w;
    for (int64_t c = 0; c < round_up(shape.c, kChunk); c += kVec) {
      float* const out = rows + (c / kChunk * count + row) * kChunk + c % kChunk;
      const int64_t lanes = std::max(shape.c - c, int64_t{0});
      const auto store = [&](int y, int x, Vec value) FASTRES_INLINED {
        value.store(out + (y * kIn + x) * position_stride);
      };
      if (inner && lanes >= kVec) {
        transform_input<m, 3>(
            [&](int y, int x) { return load_vec(origin + (y * shape.w + x) * shape.c + c); },
            store);
      } else {
        transform_input<m, 3>(
            [&](int y, int x) {
              const bool inside =
                  top + y >= 0 && top + y < shape.h && left + x >= 0 && left + x < shape.w;
              return inside ? load_vec(origin + (y * shape.w + x) * shape.c + c, lanes) : Vec(0.0f);
            },
            store);
      }
    }
  }
}

template <int m, typename T>
bool run(const ConvShape& shape, const ConvOperands<T>& operands, Range tiles, Range panels,
         float* scratch) {
  return run_winograd<m, 3, 1>(
      shape, operands, tiles, panels, scratch, [&](float* rows, int64_t position_stride) {
        gather_tiles<m>(shape, operands.input, tiles, rows, position_stride);
      });
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
