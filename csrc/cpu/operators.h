// The CPU operators, as module.cpp registers them. Semantics: the schemas in fastres/ops.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "conv_arguments.h"

namespace fastres::cpu {

at::Tensor add_relu(const at::Tensor& input, const at::Tensor& residual);

at::Tensor add_relu_backward(const at::Tensor& grad_output, const at::Tensor& output);

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu(
    const at::Tensor& input, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, bool training,
    double momentum, double eps, bool relu);

// bn_relu of known statistics. Those that it saved give its output once more, to the last bit.
at::Tensor bn_relu_apply(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                         const at::Tensor& mean, const at::Tensor& invstd,
                         const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, bool relu);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_relu_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const std::optional<at::Tensor>& output,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& save_mean, const at::Tensor& save_invstd, bool training, bool relu,
    std::array<bool, 3> output_mask);

at::Tensor conv(const at::Tensor& input, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups);

// The gradient of `input`, of which only the size and the memory format are read.
at::Tensor conv_dgrad(const at::Tensor& grad_output, const at::Tensor& input,
                      const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, int64_t groups);

// The gradients of weight and bias; one that is not wanted is empty.
std::tuple<at::Tensor, at::Tensor> conv_wgrad(const at::Tensor& grad_output,
                                              const at::Tensor& input, const at::Tensor& weight,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups,
                                              std::array<bool, 2> output_mask);

// For tests and benchmarks. One convolution by name, see name_of(), without a
// second try where a sum is not finite.
at::Tensor conv_by(const std::string& algorithm, const at::Tensor& input, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, int64_t stride, int64_t padding,
                   int64_t dilation);

// The weight's gradient by name: winograd2 or winograd4.
at::Tensor conv_wgrad_by(const std::string& algorithm, const at::Tensor& grad_output,
                         const at::Tensor& input, const at::Tensor& weight, int64_t stride,
                         int64_t padding);

// What computes a convolution of float32 tensors of these shapes: one of those, or "onednn".
std::string conv_algorithm(const at::Tensor& input, const at::Tensor& weight, int64_t stride,
                           int64_t padding, int64_t dilation, bool training);

// What computes the weight's gradient: one of those, "product" (see conv_product.h) or "aten".
std::string conv_wgrad_algorithm(const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& weight, int64_t stride, int64_t padding,
                                 int64_t dilation);

at::Tensor conv_bn_relu(const at::Tensor& input, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& residual, const at::Tensor& running_mean,
                        const at::Tensor& running_var, const std::optional<at::Tensor>& bn_weight,
                        const std::optional<at::Tensor>& bn_bias, at::IntArrayRef stride,
                        at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                        double eps, bool relu);

// The same in the residual's place.
void conv_bn_relu_(const at::Tensor& input, const at::Tensor& weight,
                   const std::optional<at::Tensor>& bias, const at::Tensor& residual,
                   const at::Tensor& running_mean, const at::Tensor& running_var,
                   const std::optional<at::Tensor>& bn_weight,
                   const std::optional<at::Tensor>& bn_bias, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double eps,
                   bool relu);

// Whether that is ahead of a new output: it spares the traffic of one, and memory.
bool is_faster_in_place(const at::Tensor& input, const at::Tensor& residual,
                        const at::Tensor& weight, const ConvGeometry& g);

// max_pool2d(conv_bn_relu(...), pool_kernel, pool_stride, pool_padding)
at::Tensor conv_bn_relu_pool(const at::Tensor& input, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, const at::Tensor& running_mean,
                             const at::Tensor& running_var,
                             const std::optional<at::Tensor>& bn_weight,
                             const std::optional<at::Tensor>& bn_bias, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             double eps, at::IntArrayRef pool_kernel, at::IntArrayRef pool_stride,
                             at::IntArrayRef pool_padding);

// linear(mean(input, {2, 3}), weight, bias)
at::Tensor mean_linear(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias);

}  // namespace fastres::cpu
