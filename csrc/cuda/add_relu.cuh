// add_relu and its gradient: element-wise over dense arrays of equal layout.
#pragma once

#include "pack.cuh"

namespace fastres::cuda {

// relu(input + residual); NaN stays NaN.
struct AddRelu {
  template <typename A>
  __device__ A operator()(A input, A residual) const {
    const A sum = input + residual;
    return sum < A(0) ? A(0) : sum;
  }
};

// grad_output where !(output <= 0), else 0: where the output is NaN the gradient passes.
struct ReluMask {
  template <typename A>
  __device__ A operator()(A grad_output, A output) const {
    return output <= A(0) ? A(0) : grad_output;
  }
};

template <typename T, typename F>
__device__ inline T combine_values(T a, T b, F f) {
  T result;
  narrow(f(widen(a), widen(b)), result);
  return result;
}

// out[i] = f(a[i], b[i]) for i < n. A thread serves one pack; the first threads of the block after
// the last pack serve the n % kSize elements that fill none. All pointers are 16-byte aligned.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads)
    combine_packs(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, int64_t n,
                  F f) {
  using P = Pack<T>;
  static_assert(sizeof(P) == kPackBytes && kThreads >= P::kSize);
  const int64_t packs = n / P::kSize;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < packs) {
    const P x = reinterpret_cast<const P*>(a)[i];
    const P y = reinterpret_cast<const P*>(b)[i];
    P z;
#pragma unroll
    for (int j = 0; j < P::kSize; ++j) z.value[j] = combine_values(x.value[j], y.value[j], f);
    reinterpret_cast<P*>(out)[i] = z;
  } else {
    const int64_t rest = packs * P::kSize + (i - packs);
    if (rest < n) out[rest] = combine_values(a[rest], b[rest], f);
  }
}

// The same an element per thread, for pointers that are not aligned.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads)
    combine_elements(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out,
                     int64_t n, F f) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) out[i] = combine_values(a[i], b[i], f);
}

// out[i] = f(a[i], b[i]) for i < n, all on the queue's device.
template <typename T, typename F, typename Queue>
void combine(const Queue& queue, const T* a, const T* b, T* out, int64_t n, F f) {
  const auto blocks = [](int64_t threads) { return (threads + kThreads - 1) / kThreads; };
  if (aligned(a) && aligned(b) && aligned(out)) {
    queue(combine_packs<T, F>, blocks(n / Pack<T>::kSize + n % Pack<T>::kSize), kThreads, a, b, out,
          n, f);
  } else {
    queue(combine_elements<T, F>, blocks(n), kThreads, a, b, out, n, f);
  }
}

}  // namespace fastres::cuda
