// How the element-wise kernels are launched: free of torch and of device code.
#pragma once

#include "pack.cuh"

namespace fastres::cuda {

enum class Combination { kAddRelu, kReluMask };

// out[i] = f(a[i], b[i]) for i < n; in add_relu.cu, for double, float, __half and __nv_bfloat16.
template <typename T>
void launch_add_relu(cudaStream_t stream, const T* a, const T* b, T* out, int64_t n, Combination f);

}  // namespace fastres::cuda
