// Launching kernels with PyTorch's current stream, through the interfaces that every build of
// PyTorch has: c10/cuda and ATen/cuda compile only against a CUDA build.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_runtime.h>

namespace fastres::cuda {

inline cudaStream_t current_stream(const at::Device& device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  TORCH_CHECK(error == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorString(error));
}

}  // namespace fastres::cuda
