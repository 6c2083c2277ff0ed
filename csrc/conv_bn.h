// What conv_bn_relu is given, and what is refused, on every device.
#pragma once

#include "checks.h"
#include "cpu/conv_arguments.h"

namespace fastres {

// y = BN_running(conv2d(x, weight, bias)), computed in `dtype`.
struct ConvBn {
  const at::Tensor& weight;
  const std::optional<at::Tensor>& bias;
  const at::Tensor &running_mean, &running_var;
  const std::optional<at::Tensor>&bn_weight, &bn_bias;
  cpu::ConvGeometry geometry;
  double eps;
  at::ScalarType dtype;
};

// Of a checked activation: the filters and the bias. Returns the output's size.
inline std::array<int64_t, 4> check_conv(const at::Tensor& input, const at::Tensor& weight,
                                         const std::optional<at::Tensor>& bias,
                                         const cpu::ConvGeometry& g) {
  cpu::check_parameter(weight, "weight", input);
  TORCH_CHECK(weight.dim() == 4, "weight: expected a 4-D tensor (K, C / groups, R, S), got ",
              weight.dim(), "-D of shape ", weight.sizes());
  TORCH_CHECK(g.groups > 0, "groups: expected a positive integer, got ", g.groups);
  const int64_t k = weight.size(0);
  TORCH_CHECK(k > 0 && k % g.groups == 0, "weight: expected its ", k,
              " output channels to be a positive multiple of groups, ", g.groups);
  TORCH_CHECK(weight.size(1) * g.groups == input.size(1), "input: expected ",
              weight.size(1) * g.groups, " channels for weight of shape ", weight.sizes(),
              " and groups=", g.groups, ", got ", input.size(1));
  if (given(bias)) cpu::check_parameter(*bias, "bias", input);
  check_per_channel(bias, "bias", k, input);
  return cpu::output_size(input, weight, g);
}

// The residual, of the size of a convolution's output.
inline void check_conv_residual(const std::optional<at::Tensor>& residual, const at::Tensor& input,
                                at::IntArrayRef size) {
  if (!given(residual)) return;
  check_tensor(*residual, "residual", input.device().type());
  TORCH_CHECK(residual->device() == input.device(), "residual: expected the device of input, ",
              input.device(), ", got ", residual->device());
  TORCH_CHECK(residual->sizes() == size, "residual: expected the shape of the ",
              "convolution's output, ", size, ", got ", residual->sizes());
  TORCH_CHECK(residual->scalar_type() == input.scalar_type(),
              "residual: expected the dtype of input, ", input.scalar_type(), ", got ",
              residual->scalar_type());
}

inline void check_conv_bn(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                          const ConvBn& c) {
  const auto size = check_conv(input, c.weight, c.bias, c.geometry);
  const int64_t k = c.weight.size(0);
  check_per_channel(c.running_mean, "running_mean", k, input);
  check_per_channel(c.running_var, "running_var", k, input);
  check_per_channel(c.bn_weight, "bn_weight", k, input);
  check_per_channel(c.bn_bias, "bn_bias", k, input);
  check_eps(c.eps, /*training=*/false);
  check_conv_residual(residual, input, size);
}

}  // namespace fastres
