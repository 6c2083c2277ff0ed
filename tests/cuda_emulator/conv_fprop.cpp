// The convolutions of csrc/cuda, for sm_90a and portable, emulated; called through ctypes.
#include "../../csrc/cuda/bn_relu.cuh"
#include "calls.h"
#include "either.h"
#include "shapes.h"

using namespace fastres::cuda;

// arrays: input, filter, residual, output, scale, shift and, of kMoments, mean and invstd; then of
// the prologue mean, invstd, weight and bias, or null
extern "C" const char* conv_fprop(const char* dtype, const int64_t* numbers, void** arrays,
                                  bool portable, int tile_k, int multiprocessors, bool moments,
                                  bool relu) {
  return with_16_bits(dtype, [&](auto type) {
    using T = decltype(type);
    const ConvShape shape = shape_of(numbers);
    const auto v = [&](int i) { return static_cast<float*>(arrays[i]); };
    const ConvTiles tiles = ConvTiles::of(shape, tile_k);
    std::vector<Moments<float>> partial(size_t(shape.k) * tiles.down);
    const ConvFprop f{arrays[0],
                      arrays[1],
                      arrays[2],
                      arrays[3],
                      PixelGrid::whole(),
                      {v(4), v(5), {}, relu, partial.data(), nullptr, tiles.down, 0},
                      {v(8), v(9), v(10), v(11)}};
    with_epilogue(moments ? Epilogue::kMoments : Epilogue::kApply, [&](auto kind) {
      run_either<T, kind>(portable, shape, f, tile_k, multiprocessors);
    });
    if (!moments) return;
    emulator::Queue()(bn_relu_finish_moments<float>, warps_of_blocks(shape.k), kThreads,
                      static_cast<const Moments<float>*>(partial.data()), int64_t(shape.k),
                      int64_t(tiles.down),
                      Statistics<float>{v(6), v(7), nullptr, nullptr, 0, 1e-5});
  });
}

extern "C" int choose_tile(const int64_t* numbers, int multiprocessors) {
  return choose_tile_k(shape_of(numbers), multiprocessors, 256, true);
}

extern "C" bool fits(const int64_t* numbers) { return fits_im2col(shape_of(numbers)); }
