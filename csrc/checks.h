// Argument checks shared by every operator. Each message names the argument, what was expected and
// what came. Operators are callable directly, so nothing may be read before it was checked here.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/MemoryFormat.h>

#include <optional>

namespace fastres {

inline bool given(const std::optional<at::Tensor>& t) { return t.has_value() && t->defined(); }

inline bool is_supported_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

// The dtype of statistics and accumulators: float32, or float64 for float64 activations.
inline at::ScalarType accumulate_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// A dense floating-point tensor of the device that the operator was dispatched to.
inline void check_tensor(const at::Tensor& t, const char* name, at::DeviceType device) {
  TORCH_CHECK(t.defined(), name, ": expected a tensor, got none");
  TORCH_CHECK(t.layout() == at::kStrided, name, ": expected a strided (dense) tensor, got layout ",
              t.layout());
  TORCH_CHECK(t.device().type() == device, name, ": expected a tensor on ", device, ", got one on ",
              t.device());
  TORCH_CHECK(is_supported_dtype(t.scalar_type()), name,
              ": expected dtype float32, float64, bfloat16 or float16, got ", t.scalar_type());
}

// An (N, C, H, W) activation.
inline void check_activation(const at::Tensor& t, const char* name, at::DeviceType device) {
  check_tensor(t, name, device);
  TORCH_CHECK_VALUE(t.dim() == 4, name, ": expected a 4-D tensor (N, C, H, W), got ", t.dim(),
                    "-D of shape ", t.sizes());
}

// A tensor that must agree with a reference one in shape, dtype and device.
inline void check_like(const at::Tensor& t, const char* name, const at::Tensor& ref,
                       const char* ref_name) {
  check_tensor(t, name, ref.device().type());
  TORCH_CHECK(t.device() == ref.device(), name, ": expected the device of ", ref_name, ", ",
              ref.device(), ", got ", t.device());
  TORCH_CHECK(t.sizes() == ref.sizes(), name, ": expected the shape of ", ref_name, ", ",
              ref.sizes(), ", got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == ref.scalar_type(), name, ": expected the dtype of ", ref_name,
              ", ", ref.scalar_type(), ", got ", t.scalar_type());
}

// One value per channel, in the activation's dtype or in the dtype of its statistics.
inline void check_per_channel(const at::Tensor& t, const char* name, int64_t channels,
                              const at::Tensor& input) {
  check_tensor(t, name, input.device().type());
  TORCH_CHECK(t.device() == input.device(), name, ": expected the device of input, ",
              input.device(), ", got ", t.device());
  TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, name, ": expected shape [", channels,
              "], one value per channel, got ", t.sizes());
  const auto wide = accumulate_dtype(input.scalar_type());
  TORCH_CHECK(t.scalar_type() == wide || t.scalar_type() == input.scalar_type(), name,
              ": expected dtype ", wide, " or that of input, ", input.scalar_type(), ", got ",
              t.scalar_type());
}

inline void check_per_channel(const std::optional<at::Tensor>& t, const char* name,
                              int64_t channels, const at::Tensor& input) {
  if (given(t)) check_per_channel(*t, name, channels, input);
}

// What is added to a variance; the batch's own may be 0.
inline void check_eps(double eps, bool training) {
  TORCH_CHECK_VALUE(training ? eps > 0 : eps >= 0, "eps: expected a ",
                    training ? "positive" : "non-negative", " number, got ", eps);
}

// The memory format of an operator's outputs: channels_last where the input suggests it.
inline at::MemoryFormat output_format(const at::Tensor& input) {
  const auto format = input.suggest_memory_format();
  return format == at::MemoryFormat::ChannelsLast ? format : at::MemoryFormat::Contiguous;
}

// A new tensor of the shape, dtype and device of `like`, dense in `format`.
inline at::Tensor empty_in(const at::Tensor& like, at::MemoryFormat format) {
  return at::empty(like.sizes(), like.options().memory_format(format));
}

}  // namespace fastres
