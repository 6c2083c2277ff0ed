// What becomes of a convolution's input on its way to the tensor cores: the batch norm and the ReLU
// of the layer before, whose own output then need not be written. Padding stays zero, which is not
// what batch norm makes of it.
#pragma once

#include "bn_relu_walk.cuh"
#include "conv_box.cuh"
#include "conv_fprop.h"

namespace fastres::cuda {

// A step of the sum: a filter tap and `kChunk` channels.
template <int kChunk>
struct Step {
  int r = 0, s = 0, c = 0;

  // The step of this number.
  __device__ static Step at(const ConvShape& shape, int number) {
    const int chunks = static_cast<int>(ceil_div(shape.c, kChunk)), tap = number / chunks;
    return {tap / shape.s, tap % shape.s, number % chunks * kChunk};
  }

  __device__ void advance(const ConvShape& shape) {
    if ((c += kChunk) < shape.c) return;
    c = 0;
    if (++s < shape.s) return;
    s = 0;
    ++r;
  }
};

// The windows of N output pixels, `apart` from each other.
template <int N>
class Windows {
 public:
  __device__ Windows(const ConvShape& shape, int64_t first, int apart) : shape_(shape) {
    for (int i = 0; i < N; ++i) {
      const int64_t pixel = first + i * apart;
      window_[i] = window_of(shape, static_cast<int>(pixel));
      if (pixel >= shape.pixels()) window_[i].h = kNowhere;
    }
  }

  // Whether a tap of the window lies in the input.
  __device__ bool has(int i, int r, int s) const {
    return static_cast<unsigned>(h(i, r)) < static_cast<unsigned>(shape_.h) &&
           static_cast<unsigned>(w(i, s)) < static_cast<unsigned>(shape_.w);
  }

  // The input's pixel there.
  __device__ int64_t pixel(int i, int r, int s) const {
    return (int64_t(window_[i].n) * shape_.h + h(i, r)) * shape_.w + w(i, s);
  }

 private:
  static constexpr int kNowhere = -(1 << 30);

  __device__ int h(int i, int r) const { return window_[i].h + r * shape_.dilation.h; }
  __device__ int w(int i, int s) const { return window_[i].w + s * shape_.dilation.w; }

  const ConvShape& shape_;
  Window window_[N];
};

// Four channels of a batch norm.
struct FourChannels {
  Coefficients<float> of[4];
};

__device__ inline FourChannels four_channels(const Vectors<float>& v, int c) {
  return {
      {coefficients(v, c), coefficients(v, c + 1), coefficients(v, c + 2), coefficients(v, c + 3)}};
}

// A batch norm's channels in shared memory, each computed once: from global memory they would be 32
// loads of a thread at every step, and the prologue is issued by the warps that multiply.
class NormTable {
 public:
  __device__ NormTable(void* memory, int channels)
      : mean_(static_cast<float*>(memory)),
        scale_(mean_ + channels),
        shift_(scale_ + channels),
        channels_(channels) {}

  // With those from `first` on, of which `left` exist. To be read once all threads are here.
  __device__ void fill(const Vectors<float>& v, int first, int left, int thread, int threads) {
    for (int i = thread; i < channels_ && i < left; i += threads) {
      const Coefficients<float> k = coefficients(v, first + i);
      mean_[i] = k.mean, scale_[i] = k.scale, shift_[i] = k.shift;
    }
  }

  // From the c-th on, a multiple of four.
  __device__ FourChannels operator()(int c) const {
    const auto mean = load<4>(mean_ + c), scale = load<4>(scale_ + c), shift = load<4>(shift_ + c);
    FourChannels k;
#pragma unroll
    for (int j = 0; j < 4; ++j) k.of[j] = {mean.value[j], scale.value[j], shift.value[j]};
    return k;
  }

 private:
  float *mean_, *scale_, *shift_;
  int channels_;
};

// relu((x - mean) * weight * invstd + bias) of N packs of eight channels, in place, rounded as
// bn_relu does. place(i): where the i-th lies; has(i): whether it is one, and no padding;
// norm(half): four of the channels.
template <typename T, int N, typename Has, typename Norm, typename Place>
__device__ void normalise(Has has, Norm norm, Place place) {
  Pack<T> x[N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = *reinterpret_cast<const Pack<T>*>(place(i));
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // few registers
    const FourChannels k = norm(half);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        T& value = x[i].value[4 * half + j];
        const float y = k.of[j](widen(value));
        narrow(y <= 0 ? 0 : y, value);  // NaN stays
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (has(i)) *reinterpret_cast<Pack<T>*>(place(i)) = x[i];
  }
}

}  // namespace fastres::cuda
