// How tensors become what the kernels of bn_relu are given.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>

#include "../bn_relu_checks.h"
#include "bn_relu_plan.h"
#include "launch.h"

namespace fastres::cuda {

inline Activation activation_of(const at::Tensor& input, at::MemoryFormat format) {
  return Activation::of(input.size(0), input.size(1), input.size(2) * input.size(3),
                        format == at::MemoryFormat::ChannelsLast);
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

// A value per channel in the type of accumulators, dense: t itself where it is so.
template <typename A>
at::Tensor vector(const std::optional<at::Tensor>& t) {
  if (!given(t)) return {};
  return t->to(c10::CppTypeToScalarType<A>::value).contiguous();
}

inline at::Tensor empty_vector(const at::Tensor& input) {
  return at::empty({input.size(1)}, input.options().dtype(accumulate_dtype(input.scalar_type())));
}

template <typename E>
at::Tensor workspace(const at::Tensor& input, int64_t elements) {
  return at::empty({elements * static_cast<int64_t>(sizeof(E))}, input.options().dtype(at::kByte));
}

}  // namespace fastres::cuda
