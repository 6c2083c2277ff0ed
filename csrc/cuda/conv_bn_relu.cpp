#include "bn_relu_host.h"
#include "conv.h"
#include "operators.h"

namespace fastres::cuda {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor conv_bn_relu(const at::Tensor& input, const at::Tensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual,
                        const at::Tensor& running_mean, const at::Tensor& running_var,
                        const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                        int64_t groups, double eps, bool relu) {
  check_activation(input, "input", at::kCUDA);
  const auto g = cpu::check_geometry(stride, padding, dilation, groups);
  const ConvBn c{weight,  bias, running_mean, running_var,        bn_weight,
                 bn_bias, g,    eps,          input.scalar_type()};
  check_conv_bn(input, residual, c);
  const Below below(input.device());
  const auto format = conv_format(input, weight);
  if (own_conv_serves(input, weight, g)) {
    const auto conv_bias = vector<float>(bias), mean = vector<float>(running_mean),
               var = vector<float>(running_var), scale = vector<float>(bn_weight),
               shift = vector<float>(bn_bias);
    const RunningBatchNorm norm{data<const float>(conv_bias), data<const float>(mean),
                                data<const float>(var),       data<const float>(scale),
                                data<const float>(shift),     static_cast<float>(eps)};
    return own_conv(input, weight, g, norm, residual, relu).contiguous(format);
  }
  const auto y = vendor_conv(input, weight, bias, g).contiguous(format);
  return std::get<0>(bn_relu(y, residual, running_mean, running_var, bn_weight, bn_bias,
                             /*training=*/false, /*momentum=*/0, eps, relu));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> conv_bn_relu_training(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& residual, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double momentum, double eps, bool relu) {
  check_activation(input, "input", at::kCUDA);
  const auto g = cpu::check_geometry(stride, padding, dilation, groups);
  const auto size = check_conv(input, weight, bias, g);
  check_conv_residual(residual, input, size);
  const BnReluArguments bn{running_mean,      running_var, bn_weight, bn_bias,
                           /*training=*/true, momentum,    eps,       relu};
  const Below below(input.device());
  const auto format = conv_format(input, weight);
  ConvMoments c{};
  if (own_conv_serves(input, weight, g) && !given(bias))
    c = own_conv_moments(input, weight, g);
  else
    c.output = vendor_conv(input, weight, bias, g);
  const auto convolved = c.output.contiguous(format);
  check_bn_relu(convolved, residual, bn, at::kCUDA);
  const auto [output, mean, invstd] = bn_relu_of(convolved, residual, bn, c.moments, c.segments);
  return {output, convolved, mean, invstd};
}

}  // namespace fastres::cuda
