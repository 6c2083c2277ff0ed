#include <ATen/ops/empty.h>

#include "bn_relu_host.h"
#include "conv.h"
#include "operators.h"

namespace fastres::cuda {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu_conv(
    const at::Tensor& input, const OptionalTensor& mean, const OptionalTensor& invstd,
    const OptionalTensor& bn_weight, const OptionalTensor& bn_bias, const at::Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double momentum, double eps, bool statistics) {
  check_activation(input, "input", at::kCUDA);
  if (given(mean)) {
    check_bn_relu_backward(input, input, std::nullopt, bn_weight, bn_bias, *mean, *invstd,
                           at::kCUDA);
  }
  const auto g = cpu::check_geometry(stride, padding, dilation, groups);
  check_conv(input, weight, bias, g);
  const Below below(input.device());
  std::optional<BatchNormBefore> before;
  if (given(mean)) before.emplace(BatchNormBefore{*mean, *invstd, bn_weight, bn_bias});
  ConvMoments c{};
  if (!own_conv_serves(input, weight, g) || given(bias)) {
    c.output = vendor_conv(activated(input, before), weight, bias, g);
  } else if (!before && !statistics) {
    c.output = own_conv(input, weight, g, {}, std::nullopt, /*relu=*/false);
  } else {
    c = own_conv_moments(input, weight, g, before);
  }
  const auto output = c.output.contiguous(conv_format(input, weight));
  if (!statistics) {
    const auto nothing = [&] { return empty_vector(output).slice(0, 0, 0).clone(); };
    return {output, nothing(), nothing()};
  }
  const OptionalTensor none;
  const BnReluArguments bn{running_mean,      running_var, none, none,
                           /*training=*/true, momentum,    eps,  /*relu=*/false};
  check_bn_relu(output, std::nullopt, bn, at::kCUDA);
  const auto [save_mean, save_invstd] = bn_relu_moments_of(output, bn, c.moments, c.segments);
  return {output, save_mean, save_invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_relu_conv_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& mean,
    const at::Tensor& invstd, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
    const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, std::array<bool, 4> output_mask) {
  const auto g = cpu::check_geometry(stride, padding, dilation, groups);
  check_gradient(grad_output, input, weight, g);
  check_bn_relu_backward(input, input, std::nullopt, bn_weight, bn_bias, mean, invstd, at::kCUDA);
  const Below below(input.device());
  const auto [want_input, want_bn, want_weight, want_bias] = output_mask;
  const auto nothing = [](const at::Tensor& like) { return at::empty({0}, like.options()); };
  auto grad_weight = nothing(weight), grad_bias = nothing(weight), grad_input = nothing(input),
       grad_bn_weight = nothing(mean), grad_bn_bias = nothing(mean);
  const BatchNormBefore before{mean, invstd, bn_weight, bn_bias};
  if (want_weight || want_bias) {
    std::tie(grad_weight, grad_bias) =
        conv_wgrad_of(grad_output, input, weight, g, {want_weight, want_bias}, before);
  }
  if (want_input || want_bn) {
    std::tie(grad_input, grad_bn_weight, grad_bn_bias) =
        bn_relu_conv_dgrad(grad_output, input, before, weight, g, want_input, want_bn);
  }
  return {grad_input, grad_bn_weight, grad_bn_bias, grad_weight, grad_bias};
}

}  // namespace fastres::cuda
