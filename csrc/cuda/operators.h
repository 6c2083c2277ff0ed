// The CUDA operators, as module.cpp registers them. Semantics: the schemas in fastres/ops.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace fastres::cuda {

at::Tensor add_relu(const at::Tensor& input, const at::Tensor& residual);

at::Tensor add_relu_backward(const at::Tensor& grad_output, const at::Tensor& output);

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu(
    const at::Tensor& input, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, bool training,
    double momentum, double eps, bool relu);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_relu_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const std::optional<at::Tensor>& output,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& save_mean, const at::Tensor& save_invstd, bool training, bool relu,
    std::array<bool, 3> output_mask);

std::tuple<at::Tensor, at::Tensor> bn_relu_moments(const at::Tensor& input,
                                                   const std::optional<at::Tensor>& running_mean,
                                                   const std::optional<at::Tensor>& running_var,
                                                   double momentum, double eps);

at::Tensor bn_relu_apply(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                         const at::Tensor& mean, const at::Tensor& invstd,
                         const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, bool relu);

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu_conv(
    const at::Tensor& input, const std::optional<at::Tensor>& mean,
    const std::optional<at::Tensor>& invstd, const std::optional<at::Tensor>& bn_weight,
    const std::optional<at::Tensor>& bn_bias, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
    const std::optional<at::Tensor>& running_var, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double momentum, double eps, bool statistics);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_relu_conv_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
    const at::Tensor& invstd, const std::optional<at::Tensor>& bn_weight,
    const std::optional<at::Tensor>& bn_bias, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    std::array<bool, 4> output_mask);

at::Tensor conv_bn_relu(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& residual, const at::Tensor& running_mean,
                        const at::Tensor& running_var, const std::optional<at::Tensor>& bn_weight,
                        const std::optional<at::Tensor>& bn_bias, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                        double eps, bool relu);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> conv_bn_relu_training(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& running_mean,
    const std::optional<at::Tensor>& running_var, const std::optional<at::Tensor>& bn_weight,
    const std::optional<at::Tensor>& bn_bias, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double momentum, double eps, bool relu);

at::Tensor conv(const at::Tensor& input, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

at::Tensor conv_dgrad(const at::Tensor& grad_output, const at::Tensor& input,
                      const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, int64_t groups);

std::tuple<at::Tensor, at::Tensor> conv_wgrad(const at::Tensor& grad_output,
                                              const at::Tensor& input, const at::Tensor& weight,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups,
                                              std::array<bool, 2> output_mask);

}  // namespace fastres::cuda
