#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/flip.h>

#include "conv_call.h"
#include "conv_dgrad_plan.h"
#include "operators.h"

namespace fastres::cuda {
namespace {

// The filters of a class: its taps, turned, from K to C channels.
at::Tensor filters_of(const DgradClass& part, const at::Tensor& weight) {
  return weight.slice(2, part.h.first, std::nullopt, part.h.every)
      .slice(3, part.w.first, std::nullopt, part.w.every)
      .flip({2, 3})
      .transpose(0, 1);
}

// The launches of one gradient.
struct Dgrad {
  std::vector<DgradClass> classes;
  std::vector<ConvCall> calls;  // of those that have taps
  int segments = 0;             // of sums, for every channel
  bool serves = true;

  Dgrad(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
        const cpu::ConvGeometry& g, Epilogue epilogue) {
    serves = has_own_values(grad_output) && has_own_values(input) && g.groups == 1;
    if (!serves) return;
    classes = dgrad_classes(conv_shape_of(input.sizes(), weight.sizes(), g));
    for (const auto& part : classes) {
      if (!part.has_taps()) continue;
      const auto& call = calls.emplace_back(grad_output, part.conv, epilogue);
      segments += call.segments();
      serves = serves && call.serves();
    }
  }

  // f: what is read beside the gradient of `input`, and the epilogue. Returns that gradient.
  at::Tensor run(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                 ConvFprop f) const {
    const auto dy = operand(grad_output);
    const auto dx =
        at::empty(input.sizes(), dy.options().memory_format(at::MemoryFormat::ChannelsLast));
    if (calls.size() < classes.size()) dx.zero_();  // no tap reaches some pixels
    f.input = dy.const_data_ptr(), f.output = dx.mutable_data_ptr(), f.epilogue.segments = segments;
    auto call = calls.begin();
    for (const auto& part : classes) {
      if (!part.has_taps()) continue;
      const auto filters = operand(filters_of(part, weight).to(dy.scalar_type()));
      f.filter = filters.const_data_ptr(), f.grid = part.grid;
      (*call)(dy, f);
      f.epilogue.first += call++->segments();
    }
    return dx;
  }
};

}  // namespace

at::Tensor conv_dgrad(const at::Tensor& grad_output, const at::Tensor& input,
                      const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, int64_t groups) {
  const auto g = cpu::check_geometry(stride, padding, dilation, groups);
  check_gradient(grad_output, input, weight, g);
  const Below below(input.device());
  const Dgrad own(grad_output, input, weight, g, Epilogue::kApply);
  if (own.serves) {
    return own.run(grad_output, input, weight, {}).contiguous(output_format(input));
  }
  return std::get<0>(at::convolution_backward(
      grad_output, input, weight.to(input.scalar_type()), std::nullopt, g.stride, g.padding,
      g.dilation, /*transposed=*/false, {0, 0}, g.groups, {true, false, false}));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> conv_dgrad_bn_relu(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    const at::Tensor& bn_input, const std::optional<at::Tensor>& bn_weight,
    const at::Tensor& save_mean, const at::Tensor& save_invstd, std::array<bool, 3> output_mask) {
  const auto g = cpu::check_geometry(stride, padding, dilation, groups);
  check_gradient(grad_output, input, weight, g);
  check_bn_relu_backward(bn_input, bn_input, input, bn_weight, std::nullopt, save_mean, save_invstd,
                         at::kCUDA);
  const Below below(input.device());
  const auto backward = [&](const at::Tensor& grad, Mask mask, std::array<bool, 3> wanted,
                            const at::Tensor& sums, int64_t segments) {
    return bn_relu_backward_of({grad, bn_input, input, bn_weight, std::nullopt, save_mean,
                                save_invstd, /*training=*/true, mask, wanted},
                               sums, segments);
  };
  const Dgrad own(grad_output, input, weight, g, Epilogue::kMask);
  if (!own.serves || own.segments == 0) {
    return backward(conv_dgrad(grad_output, input, weight, stride, padding, dilation, groups),
                    Mask::kFromOutput, output_mask, {}, 0);
  }
  const auto y = operand(input), x = operand(bn_input), mean = vector<float>(save_mean);
  const auto sums = workspace<Sums<float>>(input, input.size(1) * own.segments);
  ConvFprop f{};
  f.beside[0] = y.const_data_ptr(), f.beside[1] = x.const_data_ptr();
  f.epilogue.mean = data<const float>(mean), f.epilogue.sums = data<Sums<float>>(sums);
  const auto passed = own.run(grad_output, input, weight, f);
  const auto [want_input, want_residual, want_parameters] = output_mask;
  auto gradients =
      backward(passed, Mask::kNone, {want_input, false, want_parameters}, sums, own.segments);
  if (want_residual) std::get<1>(gradients) = passed.contiguous(output_format(bn_input));
  return gradients;
}

}  // namespace fastres::cuda
