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

// relu((x - mean) * weight * invstd + bias) of packs of eight channels from c on, in place, rounded
// as bn_relu does: those of the windows that have the tap. place(i): where the i-th window's pack
// lies.
template <typename T, int N, typename Place>
__device__ void normalise(const Windows<N>& windows, int r, int s, int c,
                          const Vectors<float>& vectors, Place place) {
  Pack<T> x[N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = *reinterpret_cast<const Pack<T>*>(place(i));
#pragma unroll
  for (int j = 0; j < 8; ++j) {  // a channel at a time: few registers
    const Coefficients<float> k = coefficients(vectors, c + j);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float y = k(widen(x[i].value[j]));
      narrow(y <= 0 ? 0 : y, x[i].value[j]);  // NaN stays
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (windows.has(i, r, s)) *reinterpret_cast<Pack<T>*>(place(i)) = x[i];
  }
}

}  // namespace fastres::cuda
