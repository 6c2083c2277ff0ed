// Convolution as a product: the pixels under every filter tap are gathered into packed rows, then
// multiplied by one panel of filters after the other.
#include "conv_kernels.h"
#include "conv_tile.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

struct Pixel {
  int64_t n, p, q;

  Pixel(const ConvShape& shape, int64_t index)
      : n(index / (shape.p * shape.q)), p(index / shape.q % shape.p), q(index % shape.q) {}

  void advance(const ConvShape& shape) {
    if (++q < shape.q) return;
    q = 0;
    if (++p < shape.p) return;
    p = 0;
    ++n;
  }
};

// Calls f(index of the tap, its pixel or null where it lies in the padding) in the filters' order.
template <typename T, typename F>
FASTRES_INLINE void for_each_tap(const ConvShape& shape, const T* input, const Pixel& at,
                                 const F& f) {
  const int64_t top = at.p * shape.stride[0] - shape.padding[0];
  const int64_t left = at.q * shape.stride[1] - shape.padding[1];
  int64_t tap = 0;
  for (int64_t r = 0; r < shape.r; ++r) {
    const int64_t y = top + r * shape.dilation[0];
    for (int64_t s = 0; s < shape.s; ++s, ++tap) {
      const int64_t x = left + s * shape.dilation[1];
      const bool inside = y >= 0 && y < shape.h && x >= 0 && x < shape.w;
      f(tap, inside ? input + ((at.n * shape.h + y) * shape.w + x) * shape.c : nullptr);
    }
  }
}

// What the coming pixels need of the input and those before them do not, by and large.
template <typename T>
Prefetch prefetch_pixels(const ConvShape& shape, const T* input, Range coming, int64_t steps) {
  const int64_t size = shape.n * shape.h * shape.w;
  const auto last_tap = [&](int64_t index) {
    const Pixel at(shape, index);
    const int64_t y = at.p * shape.stride[0] - shape.padding[0] + (shape.r - 1) * shape.dilation[0];
    const int64_t x = at.q * shape.stride[1];
    return input + std::clamp((at.n * shape.h + y) * shape.w + x, int64_t{0}, size) * shape.c;
  };
  if (shape.stride[0] > shape.r || shape.stride[1] > shape.s) return {};
  return {last_tap(coming.begin), last_tap(coming.end), steps};
}

template <typename T>
FASTRES_INLINE void copy_chunk(const T* from, float* to) {
  for (int64_t i = 0; i < kChunk; i += kVec) {
    (from == nullptr ? Vec(0.0f) : load_vec(from + i)).store(to + i);
  }
}

// Whole chunks lie in one tap: they are copied as they are.
template <typename T>
void gather_chunks(const ConvShape& shape, const T* input, Range pixels, float* rows) {
  const int64_t count = pixels.size(), chunks = shape.c / kChunk;
  Pixel at(shape, pixels.begin);
  for (int64_t row = 0; row < count; ++row, at.advance(shape)) {
    for_each_tap(shape, input, at, [&](int64_t tap, const T* pixel) {
      float* to = rows + (tap * chunks * count + row) * kChunk;
      for (int64_t i = 0; i < chunks; ++i, to += count * kChunk) {
        copy_chunk(pixel == nullptr ? nullptr : pixel + i * kChunk, to);
      }
    });
  }
}

// Writes whole vectors: up to kVec - 1 values behind the last are overwritten.
template <typename T>
FASTRES_INLINE void copy_values(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kVec) load_vec(from + i, count - i).store(to + i);
}

FASTRES_INLINE void fill_zeros(int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kVec) Vec(0.0f).store(to + i);
}

// The values under the filter at one pixel, in the filter's order. Taps that are neighbours in the
// input are copied together.
template <typename T>
FASTRES_INLINE void gather_line(const ConvShape& shape, const T* input, const Pixel& at,
                                float* line) {
  const int64_t top = at.p * shape.stride[0] - shape.padding[0];
  const int64_t left = at.q * shape.stride[1] - shape.padding[1];
  const int64_t run = shape.dilation[1] == 1 ? shape.s : 1;
  for (int64_t r = 0; r < shape.r; ++r) {
    const int64_t y = top + r * shape.dilation[0];
    const bool inside = y >= 0 && y < shape.h;
    const T* const row = input + (at.n * shape.h + y) * shape.w * shape.c;
    for (int64_t s = 0; s < shape.s; s += run, line += run * shape.c) {
      const int64_t x = left + s * shape.dilation[1];
      const int64_t begin = inside ? std::clamp(-x, int64_t{0}, run) : run;
      const int64_t end = std::clamp(shape.w - x, begin, run);
      fill_zeros(begin * shape.c, line);
      copy_values(row + (x + begin) * shape.c, (end - begin) * shape.c, line + begin * shape.c);
      fill_zeros((run - end) * shape.c, line + end * shape.c);
    }
  }
}

// Few or odd channels: the taps of a pixel follow each other, then zeros fill the last chunk.
template <typename T>
void gather_values(const ConvShape& shape, const T* input, Range pixels, float* rows) {
  const int64_t count = pixels.size(), values = shape.taps() * shape.c;
  const int64_t chunks = ceil_div(values, kChunk);
  float* const lines = rows + chunks * count * kChunk;
  Pixel at(shape, pixels.begin);
  for (int64_t row = 0; row < count; row += kLines) {
    const int64_t height = std::min(kLines, count - row);
    for (int64_t i = 0; i < height; ++i, at.advance(shape)) {
      float* const line = lines + i * chunks * kChunk;
      gather_line(shape, input, at, line);
      fill_zeros(chunks * kChunk - values, line + values);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* from = lines + chunk * kChunk;
      float* to = rows + (chunk * count + row) * kChunk;
      for (int64_t i = 0; i < height; ++i, from += chunks * kChunk, to += kChunk) {
        copy_chunk(from, to);
      }
    }
  }
}

// Where the sums of a panel go; `lanes` of its channels exist, all of them if kWhole, none of the
// right half unless kBoth.
template <typename T, bool kWhole, bool kBothHalves = true>
struct ToOutput {
  static constexpr bool kBoth = kBothHalves;

  T* output;
  Finish<T> finish;
  int64_t offset, stride, lanes;

  ToOutput from(int64_t row) const {
    ToOutput later = *this;
    later.offset += row * stride;
    return later;
  }

  ToOutput next_panel() const {
    ToOutput next = *this;
    next.offset += kPanel;
    return next;
  }

  FASTRES_INLINE void prefetch(int64_t row) const {
    const int64_t at = offset + row * stride;
    prefetch_panel<true>(output + at);
    if (finish.residual != nullptr) prefetch_panel<false>(finish.residual + at);
  }

  FASTRES_INLINE void operator()(int64_t row, Vec left, Vec right) const {
    const int64_t at = offset + row * stride;
    if constexpr (kWhole) {
      store_vec(finish(left, at), output + at);
      store_vec(finish(right, at + kVec), output + at + kVec);
    } else {
      const int64_t count = std::min(lanes, kVec);
      store_vec(finish(left, at, count), output + at, count);
      if (kBoth && lanes > kVec) {
        store_vec(finish(right, at + kVec, lanes - kVec), output + at + kVec, lanes - kVec);
      }
    }
  }
};

template <typename In, typename T>
void run_on(const In* input, const ConvShape& shape, const ConvOperands<T>& operands,
            const ConvJob& job, float* scratch) {
  const auto [pixels, panels, coming] = job;
  const auto gather = shape.c % kChunk == 0 ? &gather_chunks<In> : &gather_values<In>;
  gather(shape, input, pixels, scratch);
  const int64_t chunks = ceil_div(shape.taps() * shape.c, kChunk), count = pixels.size();
  auto prefetch = prefetch_pixels(shape, input, coming, panels.size() * tiles_of(count) * chunks);
  const auto finish = finish_of(operands);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const int64_t channel = panel * kPanel, lanes = shape.k - channel;
    const Start start(operands.bias, channel, shape.k);
    const Panels in{scratch, count * kChunk, operands.weight + panel * chunks * kChunk * kPanel,
                    chunks, start.value};
    const int64_t offset = pixels.begin * shape.k + channel;
    if (lanes >= kPanel) {
      const ToOutput<T, true> to{operands.output, finish, offset, shape.k, lanes};
      multiply_panel(count, in, prefetch, to);
    } else if (lanes <= kVec) {
      const ToOutput<T, false, false> to{operands.output, finish, offset, shape.k, lanes};
      multiply_panel(count, in, prefetch, to);
    } else {
      const ToOutput<T, false> to{operands.output, finish, offset, shape.k, lanes};
      multiply_panel(count, in, prefetch, to);
    }
  }
}

template <typename T>
void run(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
         float* scratch) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  // A pair of channels is gathered as the float32 value that would lie there.
  run_on(reinterpret_cast<const float*>(operands.input), in_pairs(shape), operands, job, scratch);
#else
  run_on(operands.input, shape, operands, job, scratch);
#endif
}

}  // namespace

template <typename T>
DirectConvKernel<T> direct_conv_kernel() {
  return {kPanel, &run<T>};
}

#if !defined(CPU_CAPABILITY_AVX512_BF16)
template DirectConvKernel<float> direct_conv_kernel<float>();
template DirectConvKernel<c10::Half> direct_conv_kernel<c10::Half>();
#endif
template DirectConvKernel<c10::BFloat16> direct_conv_kernel<c10::BFloat16>();

}  // namespace fastres::cpu::CPU_CAPABILITY
