// What bn_relu and bn_relu_backward are given, and what is refused, on every device.
#pragma once

#include "checks.h"

namespace fastres {

struct BnReluArguments {
  const std::optional<at::Tensor>&running_mean, &running_var, &weight, &bias;
  bool training;
  double momentum, eps;
  bool relu;
};

inline void check_bn_relu(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                          const BnReluArguments& a, at::DeviceType device) {
  check_activation(input, "input", device);
  if (given(residual)) check_like(*residual, "residual", input, "input");
  const int64_t channels = input.size(1);
  check_per_channel(a.running_mean, "running_mean", channels, input);
  check_per_channel(a.running_var, "running_var", channels, input);
  check_per_channel(a.weight, "weight", channels, input);
  check_per_channel(a.bias, "bias", channels, input);
  check_eps(a.eps, a.training);
  TORCH_CHECK_VALUE(given(a.running_mean) == given(a.running_var),
                    given(a.running_mean) ? "running_var" : "running_mean",
                    ": expected a tensor beside the other running statistic, got none");
  if (a.training) {
    TORCH_CHECK_VALUE(input.numel() != channels || channels == 0,
                      "input: expected more than 1 value per channel when training, got shape ",
                      input.sizes());
  } else {
    TORCH_CHECK(given(a.running_mean) && given(a.running_var),
                given(a.running_mean) ? "running_var" : "running_mean",
                ": expected running statistics when not training, got none");
  }
}

inline void check_bn_relu_apply(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                                const at::Tensor& mean, const at::Tensor& invstd,
                                const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias, at::DeviceType device) {
  check_activation(input, "input", device);
  if (given(residual)) check_like(*residual, "residual", input, "input");
  const int64_t channels = input.size(1);
  check_per_channel(weight, "weight", channels, input);
  check_per_channel(bias, "bias", channels, input);
  check_per_channel(mean, "mean", channels, input);
  check_per_channel(invstd, "invstd", channels, input);
}

inline void check_bn_relu_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                   const std::optional<at::Tensor>& output,
                                   const std::optional<at::Tensor>& weight,
                                   const std::optional<at::Tensor>& bias,
                                   const at::Tensor& save_mean, const at::Tensor& save_invstd,
                                   at::DeviceType device) {
  check_activation(input, "input", device);
  check_like(grad_output, "grad_output", input, "input");
  if (given(output)) check_like(*output, "output", input, "input");
  const int64_t channels = input.size(1);
  check_per_channel(weight, "weight", channels, input);
  check_per_channel(bias, "bias", channels, input);
  check_per_channel(save_mean, "save_mean", channels, input);
  check_per_channel(save_invstd, "save_invstd", channels, input);
}

}  // namespace fastres
