#include "bn_relu_host.h"
#include "conv.h"
#include "operators.h"

namespace fastres::cuda {

at::Tensor bn_relu_conv(const at::Tensor& input, const at::Tensor& running_mean,
                        const at::Tensor& running_var, const std::optional<at::Tensor>& bn_weight,
                        const std::optional<at::Tensor>& bn_bias, double eps,
                        const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation, int64_t groups) {
  const std::optional<at::Tensor> mean = running_mean, var = running_var;
  check_bn_relu(input, std::nullopt,
                {mean, var, bn_weight, bn_bias, /*training=*/false, 0, eps, /*relu=*/true},
                at::kCUDA);
  const auto g = cpu::check_geometry(stride, padding, dilation, groups);
  check_conv(input, weight, std::nullopt, g);
  const Below below(input.device());
  if (!own_conv_serves(input, weight, g)) {
    const auto y = std::get<0>(bn_relu(input, std::nullopt, mean, var, bn_weight, bn_bias,
                                       /*training=*/false, 0, eps, /*relu=*/true));
    return vendor_conv(y, weight, std::nullopt, g);
  }
  const auto centre = vector<float>(mean), scale = vector<float>(bn_weight),
             shift = vector<float>(bn_bias);
  const auto invstd = var->to(at::kDouble).add(eps).rsqrt().to(at::kFloat);
  return own_bn_relu_conv(input,
                          {data<const float>(centre), data<const float>(invstd),
                           data<const float>(scale), data<const float>(shift)},
                          weight, g)
      .contiguous(conv_format(input, weight));
}

}  // namespace fastres::cuda
