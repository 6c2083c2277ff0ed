// Launching kernels on PyTorch's current stream, through the interfaces that every build of
// PyTorch has: c10/cuda and ATen/cuda compile only against a CUDA build.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace fastres::cuda {

// The device's own type for one of ATen's.
template <typename T>
using device_t =
    std::conditional_t<std::is_same_v<T, c10::Half>, __half,
                       std::conditional_t<std::is_same_v<T, c10::BFloat16>, __nv_bfloat16, T>>;

inline cudaStream_t current_stream(const at::Device& device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
}

inline void check_cuda(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

inline int multiprocessors(const at::Device& device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index()),
             "cudaDevAttrMultiProcessorCount");
  return count;
}

// A stream as the torch-free host code of the .cuh files knows it: something that runs kernels in
// the order of the calls.
class Queue {
 public:
  Queue(const char* name, const at::Device& device)
      : name_(name), stream_(current_stream(device)) {}

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads,
                  const Arguments&... arguments) const {
    TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), name_, ": a launch of ", blocks,
                " blocks is too large");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(arguments...);
    check_launch(name_);
  }

 private:
  const char* name_;
  cudaStream_t stream_;
};

}  // namespace fastres::cuda
