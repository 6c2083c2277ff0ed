#include "conv_outer.h"
#include "conv_wgrad_direct_kernels.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

#if defined(CPU_CAPABILITY_AVX512_BF16)
constexpr int64_t kPixelsALane = 2;

// The values of two pixels side by side.
FASTRES_INLINE Vec load_pixels(const c10::BFloat16* const* pixels, int64_t offset) {
  const auto wide = [=](const c10::BFloat16* p) FASTRES_INLINED {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + offset)));
  };
  const __m512i second = _mm512_slli_epi32(wide(pixels[1]), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(wide(pixels[0]), second));
}
#else
constexpr int64_t kPixelsALane = 1;

template <typename T>
FASTRES_INLINE Vec load_pixels(const T* const* pixels, int64_t offset) {
  return load_vec(pixels[0] + offset);
}
#endif

constexpr int64_t lanes_of(int64_t pixels) { return ceil_div(pixels, kPixelsALane); }

// Where some pixels' values lie in memory, or zeros.
template <typename T>
class Pixels {
 public:
  void add(const T* first, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) at_[count_++] = first + i * stride;
  }

  void add_zeros(int64_t count) {
    for (int64_t i = 0; i < count; ++i) at_[count_++] = kZeros;
  }

  // The first vectors of each, from one pixel to the next `stride` values. What lies behind them is
  // fetched: it is wanted next, and the pixels lie too far apart for the processor to guess that.
  template <int kVecs>
  void copy(float* to, int64_t stride) {
    for (int64_t i = 0; i < kPixelsALane; ++i) at_[count_ + i] = kZeros;
    for (int64_t i = 0; i < count_; i += kPixelsALane, to += stride) {
      for (int v = 0; v < kVecs; ++v) load_pixels(at_ + i, v * kVec).store(to + v * kVec);
      for (int64_t j = 0; j < kPixelsALane; ++j) {
        __builtin_prefetch(at_[i + j] + kVecs * kVec, /*write=*/0, /*locality=*/2);
        if (kVecs * kVec * sizeof(T) > 64)
          __builtin_prefetch(at_[i + j] + (kVecs + 1) * kVec, 0, 2);
      }
    }
  }

 private:
  static constexpr T kZeros[kPanel] = {};

  int64_t count_ = 0;
  const T* at_[kWgradPixels + kPixelsALane];
};

// The gradient of some pixels in tiles: [tile][pixel][kOuterRows].
template <typename T>
void pack(const ConvShape& shape, const T* grad_output, Range pixels, Range tiles, float* rows) {
  static_assert(kOuterRows == kVec);
  // Of so many pixels all tiles are read before the next ones: they are neighbours in memory.
  constexpr int64_t kTogether = 16;
  const int64_t lanes = lanes_of(pixels.size()), end = shape.pixels() * shape.k;
  for (int64_t first = 0; first < pixels.size(); first += kTogether) {
    const int64_t count = std::min(kTogether, pixels.size() - first);
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const int64_t begin =
          (pixels.begin + first) * shape.k + part_of(shape.k, tiles_of(shape.k), t).begin;
      // A vector may reach into the next pixel, but not behind the last one.
      const int64_t room = end - kVec - begin;
      const int64_t whole = room < 0 ? 0 : std::min(room / shape.k + 1, count);
      Pixels<T> at;
      at.add(grad_output + begin, shape.k, whole);
      T last[kTogether][kVec] = {};
      for (int64_t i = whole; i < count; ++i) {
        std::copy(grad_output + begin + i * shape.k, grad_output + end, last[i]);
        at.add(last[i], 0, 1);
      }
      at.template copy<1>(rows + ((t - tiles.begin) * lanes + first / kPixelsALane) * kOuterRows,
                          kOuterRows);
    }
  }
}

// Some vectors of the pixels under a tap: `column` counts [tap][channel].
template <int kVecs, typename T>
void gather(const ConvShape& shape, const T* input, Range pixels, int64_t column, float* to) {
  const int64_t tap = column / shape.c;
  const int64_t down = tap / shape.s * shape.dilation[0] - shape.padding[0];
  const int64_t right = tap % shape.s * shape.dilation[1] - shape.padding[1];
  Pixels<T> at;
  for (int64_t pixel = pixels.begin; pixel < pixels.end;) {  // row by row
    const int64_t q = pixel % shape.q, row = pixel / shape.q;
    const int64_t count = std::min(shape.q - q, pixels.end - pixel);
    const int64_t y = row % shape.p * shape.stride[0] + down, x = q * shape.stride[1] + right;
    const bool inside = y >= 0 && y < shape.h;
    const int64_t step = shape.stride[1];
    const int64_t begin = inside ? std::clamp(ceil_div(-x, step), int64_t{0}, count) : count;
    const int64_t end = std::clamp(ceil_div(shape.w - x, step), begin, count);
    at.add_zeros(begin);
    const int64_t line = (row / shape.p * shape.h + y) * shape.w;
    at.add(input + (line + x + begin * step) * shape.c + column % shape.c, step * shape.c,
           end - begin);
    at.add_zeros(count - end);
    pixel += count;
  }
  at.template copy<kVecs>(to, kPanel);
}

// Adds the products of packed rows to one panel of the sums.
template <typename T>
void multiply(const ConvShape& shape, const T* input, Range pixels, Range tiles, const float* rows,
              int64_t column, float* panel, float* sums) {
  const int64_t columns = shape.taps() * shape.c, packed = lanes_of(pixels.size());
  const bool whole = column + kVec < columns;
  for (int64_t first = 0; first < pixels.size(); first += kWgradPixels) {
    const Range now{pixels.begin + first,
                    std::min(pixels.begin + first + kWgradPixels, pixels.end)};
    if (shape.c % kPanel == 0) {
      gather<2>(shape, input, now, column, panel);
    } else {
      gather<1>(shape, input, now, column, panel);
      if (whole) gather<1>(shape, input, now, column + kVec, panel + kVec);
    }
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const Range k = part_of(shape.k, tiles_of(shape.k), t);
      const int64_t at = (t - tiles.begin) * packed + first / kPixelsALane;
      multiply_outer_rows(k.size(), rows + at * kOuterRows, panel, lanes_of(now.size()),
                          {sums + k.begin * columns + column, columns, whole});
    }
  }
}

constexpr int64_t kPackedValues = kWgradTiles * lanes_of(kWgradPacked) * kOuterRows;

template <typename T>
void run(const ConvShape& shape, const T* grad_output, const T* input, Range pixels, Range tiles,
         Range panels, float* scratch, float* sums) {
  float* const panel = scratch + kPackedValues;
  for (int64_t t = tiles.begin; t < tiles.end; t += kWgradTiles) {
    const Range some{t, std::min(t + kWgradTiles, tiles.end)};
    for (int64_t first = pixels.begin; first < pixels.end; first += kWgradPacked) {
      const Range now{first, std::min(first + kWgradPacked, pixels.end)};
      pack(shape, grad_output, now, some, scratch);
      for (int64_t i = panels.begin; i < panels.end; ++i) {
        multiply(shape, input, now, some, scratch, i * kPanel, panel, sums);
      }
    }
  }
}

}  // namespace

template <typename T>
DirectWgradKernel<T> direct_wgrad_kernel() {
  return {kTileRows, kPanel, kVec, kPackedValues + lanes_of(kWgradPixels) * kPanel, &run<T>};
}

#if !defined(CPU_CAPABILITY_AVX512_BF16)
template DirectWgradKernel<float> direct_wgrad_kernel<float>();
#endif
template DirectWgradKernel<c10::BFloat16> direct_wgrad_kernel<c10::BFloat16>();

}  // namespace fastres::cpu::CPU_CAPABILITY
