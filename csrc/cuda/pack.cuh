// Values as they lie in memory and as they are computed with.
#pragma once

#if defined(FASTRES_EMULATOR)  // the tests run kernels on the CPU
#include "emulator.h"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fastres::cuda {

constexpr int kThreads = 256;   // a block's, of kernels that go once over an activation
constexpr int kPackBytes = 16;  // the widest memory access that every architecture has

// kSize neighbouring values, read and written in one access.
template <typename T, int N = kPackBytes / sizeof(T)>
struct alignas(N * sizeof(T)) Pack {
  static constexpr int kSize = N;
  T value[N];
};

// What is computed with: fp64 for fp64, fp32 for everything narrower.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

template <int N, typename T>
__device__ inline Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

// Sixteen bytes by an instruction of that name: what is left to the compiler becomes narrow stores.
template <int N, typename T>
__device__ inline void store(T* p, const Pack<T, N>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(pack) == sizeof(int4)) {
    __stwb(reinterpret_cast<int4*>(p), *reinterpret_cast<const int4*>(&pack));
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0; }

}  // namespace fastres::cuda
