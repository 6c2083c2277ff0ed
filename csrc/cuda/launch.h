// What host code needs of PyTorch and of the device, through the interfaces that every build of
// PyTorch has: c10/cuda and ATen/cuda compile only against a CUDA build.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "pack.cuh"

namespace fastres::cuda {

// What an operator runs in: below autograd and autocast, which saw the call already, on its
// tensors' device.
struct Below {
  explicit Below(const at::Device& device) : device(device) {}

  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCUDA};
  const c10::DeviceGuard device;
};

// The device's own type for one of ATen's.
template <typename T>
using device_t =
    std::conditional_t<std::is_same_v<T, c10::Half>, __half,
                       std::conditional_t<std::is_same_v<T, c10::BFloat16>, __nv_bfloat16, T>>;

inline cudaStream_t current_stream(const at::Tensor& t) {
  const c10::impl::VirtualGuardImpl guard(t.device().type());
  return static_cast<cudaStream_t>(guard.getStream(t.device()).native_handle());
}

inline void check_cuda(cudaError_t error, const char* what) {
  TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, const at::Tensor& t) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, t.device().index()), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors(const at::Tensor& t) {
  return attribute(cudaDevAttrMultiProcessorCount, t);
}

// Null where there is no tensor.
template <typename T>
T* data(const at::Tensor& t) {
  if (!t.defined()) return nullptr;
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(t.const_data_ptr());
  else
    return static_cast<T*>(t.mutable_data_ptr());
}

// A value per channel in the type of accumulators, dense and on a boundary of 16 bytes, for kernels
// read two at once: t itself where it is so.
template <typename A>
at::Tensor vector(const std::optional<at::Tensor>& t) {
  if (!t.has_value() || !t->defined()) return {};
  const auto dense = t->to(c10::CppTypeToScalarType<A>::value).contiguous();
  return aligned(dense.const_data_ptr()) ? dense : dense.clone();
}

template <typename E>
at::Tensor workspace(const at::Tensor& like, int64_t elements) {
  return at::empty({elements * static_cast<int64_t>(sizeof(E))}, like.options().dtype(at::kByte));
}

}  // namespace fastres::cuda
