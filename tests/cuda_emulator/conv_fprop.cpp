// The convolutions of csrc/cuda, emulated; called through ctypes.
#include "../../csrc/cuda/bn_relu.cuh"
#include "calls.h"
#include "convolution.h"
#include "shapes.h"

using namespace fastres::cuda;

// arrays: input, filter, residual, output; of the convolution its bias, of batch norm in eval mean,
// variance, weight and bias; of kMoments mean and invstd; of the prologue mean, invstd, weight and
// bias; or null
extern "C" const char* conv_fprop(const char* dtype, const int64_t* numbers, void** arrays,
                                  const char* kernel, int tile_k, int multiprocessors, bool moments,
                                  bool relu) {
  return with_16_bits(dtype, [&](auto type) {
    using T = decltype(type);
    const ConvShape shape = shape_of(numbers);
    const auto v = [&](int i) { return static_cast<float*>(arrays[i]); };
    const ConvTiles tiles = ConvTiles::of(shape, tile_k);
    std::vector<Moments<float>> partial(size_t(shape.k) * tiles.down);
    const ConvFprop f{
        arrays[0],
        arrays[1],
        arrays[2],
        arrays[3],
        PixelGrid::whole(),
        {{v(4), v(5), v(6), v(7), v(8), 1e-5f}, {}, relu, partial.data(), nullptr, tiles.down, 0},
        {v(11), v(12), v(13), v(14)}};
    with_epilogue(moments ? Epilogue::kMoments : Epilogue::kApply, [&](auto kind) {
      run_convolution<T, kind>(kernel, shape, f, tile_k, multiprocessors);
    });
    if (!moments) return;
    emulator::Queue()(bn_relu_finish_moments<float>, warps_of_blocks(shape.k), kThreads,
                      static_cast<const Moments<float>*>(partial.data()), int64_t(shape.k),
                      int64_t(tiles.down),
                      Statistics<float>{v(9), v(10), nullptr, nullptr, 0, 1e-5});
  });
}

extern "C" int choose_tile(const int64_t* numbers, int multiprocessors) {
  return choose_tile_k(shape_of(numbers), multiprocessors, 256, true);
}

extern "C" bool takes_prologue(const int64_t* numbers, int multiprocessors) {
  const ConvShape shape = shape_of(numbers);
  const int tile_k =
      choose_tile_k(shape, multiprocessors, most_tile_k(Epilogue::kMoments, true), true);
  return fprop_takes_prologue(shape, tile_k, multiprocessors);
}

extern "C" int shares_of(const int64_t* numbers, int multiprocessors) {
  return split_shares(shape_of(numbers), multiprocessors);
}

// Whether the shares of every number have each step once, as the kernel counts them.
extern "C" bool shares_cover(const int64_t* numbers) {
  const ConvShape shape = shape_of(numbers);
  for (int shares : {1, 2, 4, 8}) {
    if (shares > steps_of(shape)) continue;
    int next = 0;
    for (int share = 0; share < shares; ++share) {
      const auto steps = SplitSteps::of(shape, share, shares);
      if (steps.first != next || steps.last <= steps.first) return false;
      auto step = Step<ConvTiles::kChunk>::at(shape, steps.first);
      for (; next < steps.last; ++next, step.advance(shape)) {
        const auto same = Step<ConvTiles::kChunk>::at(shape, next);
        if (step.r != same.r || step.s != same.s || step.c != same.c) return false;
      }
    }
    if (next != steps_of(shape)) return false;
  }
  return true;
}

extern "C" bool fits(const int64_t* numbers) { return fits_im2col(shape_of(numbers)); }
