#include "conv.h"

#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include "bn_relu_host.h"
#include "operators.h"

namespace fastres::cuda {
void check_gradient(const at::Tensor& grad_output, const at::Tensor& input,
                    const at::Tensor& weight, const cpu::ConvGeometry& g) {
  check_activation(input, "input", at::kCUDA);
  const auto size = check_conv(input, weight, std::nullopt, g);
  check_activation(grad_output, "grad_output", at::kCUDA);
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(size),
              "grad_output: expected the shape of the convolution's output, ",
              at::IntArrayRef(size), ", got ", grad_output.sizes());
  TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(),
              "grad_output: expected the dtype of input, ", input.scalar_type(), ", got ",
              grad_output.scalar_type());
}

at::Tensor conv(const at::Tensor& input, const at::Tensor& weight,
                const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  check_activation(input, "input", at::kCUDA);
  const auto g = cpu::check_geometry(stride, padding, dilation, groups);
  check_conv(input, weight, bias, g);
  const Below below(input.device());
  if (!own_conv_serves(input, weight, g)) return vendor_conv(input, weight, bias, g);
  const auto conv_bias = vector<float>(bias);
  RunningBatchNorm none{};
  none.conv_bias = data<const float>(conv_bias);
  return own_conv(input, weight, g, none, std::nullopt, /*relu=*/false)
      .contiguous(conv_format(input, weight));
}

NormVectors::NormVectors(const std::optional<BatchNormBefore>& bn) {
  if (!bn) return;
  mean_ = vector<float>(bn->mean), invstd_ = vector<float>(bn->invstd);
  weight_ = vector<float>(bn->weight), bias_ = vector<float>(bn->bias);
}

NormVectors::operator Vectors<float>() const {
  return {data<const float>(mean_), data<const float>(invstd_), data<const float>(weight_),
          data<const float>(bias_)};
}

at::Tensor activated(const at::Tensor& input, const std::optional<BatchNormBefore>& bn) {
  if (!bn) return input;
  return bn_relu_apply(input, std::nullopt, bn->mean, bn->invstd, bn->weight, bn->bias,
                       /*relu=*/true);
}

std::tuple<at::Tensor, at::Tensor> conv_wgrad_of(const at::Tensor& grad_output,
                                                 const at::Tensor& input, const at::Tensor& weight,
                                                 const cpu::ConvGeometry& g,
                                                 std::array<bool, 2> output_mask,
                                                 const std::optional<BatchNormBefore>& bn) {
  const auto as_asked = [&](const at::Tensor& t) {
    return t.defined() ? t.to(weight.scalar_type()) : at::empty({0}, weight.options());
  };
  const auto [want_weight, want_bias] = output_mask;
  if (want_weight && own_wgrad_serves(input, weight, g)) {
    const auto bias = want_bias ? grad_output.sum({0, 2, 3}) : at::Tensor();
    const auto filters = as_asked(own_wgrad(grad_output, input, weight, g, bn));
    return {filters.contiguous(output_format(weight)), as_asked(bias)};
  }
  const std::array<int64_t, 1> outputs{weight.size(0)};
  const auto [_, grad_weight, grad_bias] = at::convolution_backward(
      grad_output, activated(input, bn), weight.to(input.scalar_type()), at::IntArrayRef(outputs),
      g.stride, g.padding, g.dilation, /*transposed=*/false, {0, 0}, g.groups,
      {false, want_weight, want_bias});
  return {as_asked(grad_weight), as_asked(grad_bias)};
}

std::tuple<at::Tensor, at::Tensor> conv_wgrad(const at::Tensor& grad_output,
                                              const at::Tensor& input, const at::Tensor& weight,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups,
                                              std::array<bool, 2> output_mask) {
  const auto g = cpu::check_geometry(stride, padding, dilation, groups);
  check_gradient(grad_output, input, weight, g);
  const Below below(input.device());
  return conv_wgrad_of(grad_output, input, weight, g, output_mask, std::nullopt);
}

}  // namespace fastres::cuda
