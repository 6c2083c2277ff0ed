// The gradient of the filters of csrc/cuda for sm_90a, emulated; called through
// ctypes.
#include "../../csrc/cuda/conv_wgrad_sm90.cuh"
#include "calls.h"
#include "shapes.h"

using namespace fastres::cuda;

// arrays: grad_output, input, grad_filter; then of the prologue mean, invstd, weight and bias, or
// null
extern "C" const char* conv_wgrad(const char* dtype, const int64_t* numbers, void** arrays,
                                  int multiprocessors) {
  return with_16_bits(dtype, [&](auto type) {
    using T = decltype(type);
    const ConvShape shape = shape_of(numbers);
    const auto v = [&](int i) { return static_cast<float*>(arrays[i]); };
    const auto tiles = WgradTiles::of(shape, multiprocessors);
    std::vector<float> partial(size_t(tiles.shares) * shape.k * shape.r * shape.s * shape.c, NAN);
    conv_wgrad_sm90_run<T>(
        emulator::Queue(), shape,
        {arrays[0], arrays[1], partial.data(), arrays[2], {v(3), v(4), v(5), v(6)}},
        multiprocessors);
  });
}

// Whether every step of every tile is done once: the plan, exhaustively.
extern "C" bool wgrad_covers(const int64_t* numbers, int multiprocessors) {
  const ConvShape shape = shape_of(numbers);
  const auto t = WgradTiles::of(shape, multiprocessors);
  const int64_t all = ceil_div(shape.pixels(), WgradTiles::kPixels);
  std::vector<int> done(t.tiles() * all);
  for (int block = 0; block < t.blocks(); ++block) {
    if (t.filter(block) >= shape.k || t.row(block, 0) >= t.rows || t.share(block) >= t.shares) {
      return false;
    }
    const int64_t first = int64_t(t.share(block)) * t.steps;
    if (first >= all) return false;  // nothing to do
    for (int64_t i = first; i < std::min<int64_t>(first + t.steps, all); ++i) {
      ++done[block % t.tiles() * all + i];
    }
  }
  return std::all_of(done.begin(), done.end(), [](int n) { return n == 1; });
}

extern "C" bool takes_prologue(const int64_t* numbers, int multiprocessors) {
  return wgrad_takes_prologue(shape_of(numbers), multiprocessors);
}

// Filters of a tile and shares: what the plan chose.
extern "C" void wgrad_plan(const int64_t* numbers, int multiprocessors, int* tile_k, int* shares) {
  const auto t = WgradTiles::of(shape_of(numbers), multiprocessors);
  *tile_k = t.tile_k, *shares = t.shares;
}
