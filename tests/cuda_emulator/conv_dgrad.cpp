// The gradient of the input by the convolutions of csrc/cuda, emulated; called through ctypes.
#include <map>
#include <tuple>

#include "../../csrc/cuda/bn_relu_backward.cuh"
#include "../../csrc/cuda/conv_dgrad_plan.h"
#include "calls.h"
#include "convolution.h"
#include "shapes.h"

using namespace fastres::cuda;

namespace {

// The filters (C, taps of the class, K) of those (K, R, S, C).
template <typename T>
std::vector<T> filters_of(const DgradClass& part, const ConvShape& s, const T* w) {
  std::vector<T> found;
  for (int c = 0; c < s.c; ++c) {
    for (int i = part.h.count - 1; i >= 0; --i) {
      for (int j = part.w.count - 1; j >= 0; --j) {
        const int r = part.h.first + part.h.every * i, column = part.w.first + part.w.every * j;
        for (int k = 0; k < s.k; ++k) found.push_back(w[((k * s.r + r) * s.s + column) * s.c + c]);
      }
    }
  }
  return found;
}

}  // namespace

// arrays: grad_output, filter, grad_input; of the masked form also batch norm's input, mean,
// invstd, weight and bias (C), and slopes, grad_weight and grad_bias (C)
extern "C" const char* conv_dgrad(const char* dtype, const int64_t* numbers, void** arrays,
                                  const char* kernel, bool masked, int tile_k,
                                  int multiprocessors) {
  return with_16_bits(dtype, [&](auto type) {
    using T = decltype(type);
    const ConvShape shape = shape_of(numbers);
    const auto v = [&](int i) { return static_cast<float*>(arrays[i]); };
    const auto classes = dgrad_classes(shape);
    int segments = 0;
    for (const auto& part : classes) {
      if (part.has_taps()) segments += ConvTiles::of(part.conv, tile_k).down;
    }
    std::vector<Sums<float>> sums(size_t(shape.c) * segments, {NAN, NAN});
    ConvFprop f{arrays[0], nullptr, nullptr, arrays[2], {}, {}, {}};
    if (masked) f.beside = arrays[3], f.epilogue.behind = {v(4), v(5), v(6), v(7)};
    f.epilogue.sums = sums.data(), f.epilogue.segments = segments;
    for (const auto& part : classes) {
      if (!part.has_taps()) continue;
      const auto filters = filters_of(part, shape, static_cast<const T*>(arrays[1]));
      f.filter = filters.data(), f.grid = part.grid;
      with_epilogue(masked ? Epilogue::kMask : Epilogue::kApply, [&](auto kind) {
        run_convolution<T, kind>(kernel, part.conv, f, tile_k, multiprocessors);
      });
      f.epilogue.first += ConvTiles::of(part.conv, tile_k).down;
    }
    if (!masked) return;
    emulator::Queue()(bn_relu_finish_sums<float>, warps_of_blocks(shape.c), kThreads,
                      static_cast<const Sums<float>*>(sums.data()), static_cast<const float*>(v(5)),
                      int64_t(shape.c), int64_t(segments), shape.n * shape.h * shape.w,
                      static_cast<Slopes<float>*>(arrays[8]), v(9), v(10));
  });
}

// Whether the classes' convolutions have the products of the gradient, each once: index by index.
extern "C" bool dgrad_covers(const int64_t* numbers) {
  const ConvShape s = shape_of(numbers);
  using Product = std::tuple<int64_t, int, int, int, int>;  // input pixel, output row, column, tap
  std::map<Product, int> left;
  std::vector<int> seen(s.n * s.h * s.w);
  const int p = s.p(), q = s.q();
  for (int64_t i = 0; i < s.pixels(); ++i) {
    const Window at = window_of(s, int(i));
    for (int r = 0; r < s.r; ++r) {
      for (int c = 0; c < s.s; ++c) {
        const int h = at.h + r * s.dilation.h, w = at.w + c * s.dilation.w;
        if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
        left[{(at.n * s.h + h) * s.w + w, int(i / q % p), int(i % q), r, c}] = 1;
      }
    }
  }
  for (const auto& part : dgrad_classes(s)) {
    const int64_t pixels = s.n * part.h.size * part.w.size;
    if (part.has_taps() && part.conv.pixels() != pixels) return false;
    for (int64_t i = 0; i < pixels; ++i) {
      ConvShape plain = part.conv;  // a class without taps has pixels all the same
      if (!part.has_taps()) {
        plain.h = part.h.size, plain.w = part.w.size, plain.r = plain.s = 1;
        plain.padding = plain.padding_end = {0, 0};
      }
      const int64_t pixel = part.grid(plain, i);
      if (pixel < 0 || pixel >= int64_t(seen.size()) || seen[pixel]++) return false;
      if (!part.has_taps()) continue;
      const Window at = window_of(part.conv, int(i));
      if (at.n != pixel / (s.h * s.w)) return false;
      for (int r = 0; r < part.h.count; ++r) {
        for (int c = 0; c < part.w.count; ++c) {
          const int row = at.h + r * part.conv.dilation.h, column = at.w + c * part.conv.dilation.w;
          if (row < 0 || row >= p || column < 0 || column >= q) continue;
          const Product product{pixel, row, column,
                                part.h.first + part.h.every * (part.h.count - 1 - r),
                                part.w.first + part.w.every * (part.w.count - 1 - c)};
          if (left.erase(product) != 1) return false;
        }
      }
    }
  }
  return left.empty() && std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; });
}
