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

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu_conv_dgrad(
    const at::Tensor& grad_output, const at::Tensor& input, const BatchNormBefore& bn,
    const at::Tensor& weight, const cpu::ConvGeometry& g, bool want_input, bool want_parameters) {
  const std::optional<at::Tensor> no_output;
  const auto backward = [&](const at::Tensor& grad, Mask mask, const at::Tensor& sums,
                            int64_t segments) {
    auto [dx, _, grad_weight, grad_bias] =
        bn_relu_backward_of({grad,
                             input,
                             no_output,
                             bn.weight,
                             bn.bias,
                             bn.mean,
                             bn.invstd,
                             /*training=*/true,
                             mask,
                             {want_input, /*residual=*/false, want_parameters}},
                            sums, segments);
    return std::make_tuple(dx, grad_weight, grad_bias);
  };
  const Dgrad own(grad_output, input, weight, g, Epilogue::kMask);
  if (!own.serves || own.segments == 0) {
    const auto grad =
        conv_dgrad(grad_output, input, weight, g.stride, g.padding, g.dilation, g.groups);
    return backward(grad, Mask::kFromInput, {}, 0);
  }
  const auto x = operand(input);
  const NormVectors vectors(bn);
  const auto sums = workspace<Sums<float>>(input, input.size(1) * own.segments);
  ConvFprop f{};
  f.beside = x.const_data_ptr();
  f.epilogue.behind = vectors;
  f.epilogue.sums = data<Sums<float>>(sums);
  return backward(own.run(grad_output, input, weight, f), Mask::kNone, sums, own.segments);
}

}  // namespace fastres::cuda
