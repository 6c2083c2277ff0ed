// add_relu and its gradient: element-wise over dense arrays of equal layout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastres::cuda {

constexpr int kThreads = 256;
constexpr int kPackBytes = 16;  // the widest memory access that every architecture has

template <typename T>
struct alignas(kPackBytes) Pack {
  static constexpr int kSize = kPackBytes / sizeof(T);
  T value[kSize];
};

// What is computed with: fp64 for fp64, fp32 for everything narrower.
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

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
__device__ inline T combine(T a, T b, F f) {
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
    for (int j = 0; j < P::kSize; ++j) z.value[j] = combine(x.value[j], y.value[j], f);
    reinterpret_cast<P*>(out)[i] = z;
  } else {
    const int64_t rest = packs * P::kSize + (i - packs);
    if (rest < n) out[rest] = combine(a[rest], b[rest], f);
  }
}

// The same an element per thread, for pointers that are not aligned.
template <typename T, typename F>
__global__ void __launch_bounds__(kThreads)
    combine_elements(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out,
                     int64_t n, F f) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) out[i] = combine(a[i], b[i], f);
}

}  // namespace fastres::cuda
