// The weight's gradient, by what computes it fastest: the project's own kernels, a product of
// matrices, or ATen's convolution (oneDNN's).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>

#include <array>
#include <string>
#include <tuple>

#include "../checks.h"
#include "capability.h"
#include "conv_arguments.h"
#include "conv_product.h"
#include "conv_wgrad_direct.h"
#include "conv_wgrad_winograd.h"
#include "operators.h"
#include "pooled.h"

namespace fastres::cpu {
namespace {

enum class WgradAlgorithm { kAten, kProduct, kDirect, kWinograd2, kWinograd4 };
constexpr std::array kNames{"aten", "product", "direct", "winograd2", "winograd4"};

const char* name_of(WgradAlgorithm algorithm) { return kNames[static_cast<size_t>(algorithm)]; }

// False for what ATen is left to refuse, and for empty tensors.
bool fits(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
          const ConvGeometry& g) {
  return grad_output.dim() == 4 && input.dim() == 4 && weight.dim() == 4 && g.groups > 0 &&
         input.size(1) == weight.size(1) * g.groups && input.numel() > 0 &&
         grad_output.numel() > 0 &&
         grad_output.sizes() == at::IntArrayRef(output_size(input, weight, g));
}

WgradAlgorithm choose(const at::Tensor& grad_output, const at::Tensor& input,
                      const at::Tensor& weight, const ConvGeometry& g) {
  using enum WgradAlgorithm;
  const auto dtype = input.scalar_type();
  if (grad_output.scalar_type() != dtype || weight.scalar_type() != dtype ||
      !fits(grad_output, input, weight, g)) {
    return kAten;
  }
  const bool bf16 = dtype == at::kBFloat16, own = bf16 || dtype == at::kFloat;
  const auto shape = shape_of(input, weight, g);
  if (const int64_t m = own ? choose_winograd_wgrad(shape, bf16) : 0) {
    return m == 2 ? kWinograd2 : kWinograd4;
  }
  const bool direct = own && choose_direct_wgrad(shape, bf16);
  if (direct && !bf16) return kDirect;
  // Of bfloat16 and few pixels products are ahead: at 7x7, 8 images, 2.5 against 3.3 to 3.5 ms.
  if (is_product(input, weight, g, Pass::kWgrad)) return kProduct;
  return direct ? kDirect : kAten;
}

template <typename T>
bool winograd_as(const at::Tensor& dy, const at::Tensor& x, const ConvShape& shape, int64_t m,
                 const at::Tensor& grad_weight) {
  return run_winograd_wgrad<T>(
      shape, m, {x.const_data_ptr<T>(), dy.const_data_ptr<T>(), grad_weight.mutable_data_ptr<T>()});
}

// By Winograd's tiles of m x m; undefined where a sum was not finite.
at::Tensor winograd_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                          const ConvShape& shape, int64_t m) {
  const auto x = in_channels_last(input), dy = in_channels_last(grad_output);
  const auto grad_weight = empty_output({shape.k, shape.c, shape.r, shape.s}, x.scalar_type(),
                                        at::MemoryFormat::ChannelsLast);
  const bool finite = x.scalar_type() == at::kFloat
                          ? winograd_as<float>(dy, x, shape, m, grad_weight)
                          : winograd_as<c10::BFloat16>(dy, x, shape, m, grad_weight);
  return finite ? grad_weight : at::Tensor();
}

// In channels_last; undefined where ATen has to compute it.
at::Tensor wgrad_by(WgradAlgorithm algorithm, const at::Tensor& grad_output,
                    const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& g) {
  switch (algorithm) {
    case WgradAlgorithm::kAten:
      return {};
    case WgradAlgorithm::kProduct:
      return product_wgrad(grad_output, input, weight, g);
    case WgradAlgorithm::kDirect:
      return direct_wgrad(grad_output, input, shape_of(input, weight, g));
    case WgradAlgorithm::kWinograd2:
      return winograd_wgrad(grad_output, input, shape_of(input, weight, g), 2);
    case WgradAlgorithm::kWinograd4:
      return winograd_wgrad(grad_output, input, shape_of(input, weight, g), 4);
  }
  return {};
}

std::tuple<at::Tensor, at::Tensor> aten_wgrad(const at::Tensor& grad_output,
                                              const at::Tensor& input, const at::Tensor& weight,
                                              const ConvGeometry& g,
                                              std::array<bool, 2> output_mask) {
  const bool widen = input.scalar_type() == at::kBFloat16 && bfloat16_unit() == Bfloat16Unit::kNone;
  const auto dtype = widen ? at::kFloat : input.scalar_type();
  const bool follow = follows_weights(weight, grad_output.numel() + input.numel());
  const auto operand = [&](const at::Tensor& t) {
    return follow ? t.to(dtype).contiguous() : t.to(dtype);
  };
  const auto x = operand(input);
  const bool last = output_format(x) == at::MemoryFormat::ChannelsLast ||
                    output_format(weight) == at::MemoryFormat::ChannelsLast;
  const auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  // Of the weights only the shape counts, but ATen would bring their values to its format, too.
  const bool fits = weight.scalar_type() == dtype && weight.is_contiguous(format);
  const auto shaped = fits ? weight : at::empty(weight.sizes(), x.options().memory_format(format));
  const std::array<int64_t, 1> outputs{weight.size(0)};
  const auto [_, grad_weight, grad_bias] = at::convolution_backward(
      operand(grad_output), x, shaped, at::IntArrayRef(outputs), g.stride, g.padding, g.dilation,
      /*transposed=*/false, {0, 0}, g.groups, {false, output_mask[0], output_mask[1]});
  return {grad_weight, grad_bias};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> conv_wgrad(const at::Tensor& grad_output,
                                              const at::Tensor& input, const at::Tensor& weight,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, int64_t groups,
                                              std::array<bool, 2> output_mask) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto g = check_geometry(stride, padding, dilation, groups);
  at::Tensor grad_weight, grad_bias;
  if (output_mask[0] && !output_mask[1]) {
    grad_weight = wgrad_by(choose(grad_output, input, weight, g), grad_output, input, weight, g);
  }
  if (!grad_weight.defined()) {
    std::tie(grad_weight, grad_bias) = aten_wgrad(grad_output, input, weight, g, output_mask);
  }
  const auto narrow = [&](const at::Tensor& t) {
    return t.defined() ? t.to(weight.scalar_type()) : weight.new_empty({0});
  };
  if (!output_mask[0]) return {narrow(grad_weight), narrow(grad_bias)};
  const auto grad = narrow(grad_weight).contiguous(output_format(weight));
  // Dimensions of one element may have any stride. DistributedDataParallel asks for the weight's.
  if (weight.is_contiguous(output_format(weight)))
    grad.as_strided_(weight.sizes(), weight.strides());
  return {grad, narrow(grad_bias)};
}

at::Tensor conv_wgrad_by(const std::string& algorithm, const at::Tensor& grad_output,
                         const at::Tensor& input, const at::Tensor& weight, int64_t stride,
                         int64_t padding) {
  using enum WgradAlgorithm;
  const auto g = geometry_of(input, weight, stride, padding, /*dilation=*/1);
  const auto dtype = input.scalar_type();
  TORCH_CHECK_VALUE(
      grad_output.scalar_type() == dtype && (dtype == at::kFloat || dtype == at::kBFloat16),
      "input: expected float32 or bfloat16 as grad_output, got ", dtype);
  TORCH_CHECK_VALUE(fits(grad_output, input, weight, g),
                    "grad_output: expected the shape of the convolution's output, got ",
                    grad_output.sizes());
  const auto shape = shape_of(input, weight, g);
  for (const auto a : {kDirect, kWinograd2, kWinograd4}) {
    if (algorithm != name_of(a)) continue;
    TORCH_CHECK_VALUE(
        a == kDirect ? can_compute_direct_wgrad(shape) : can_compute_winograd_wgrad(shape),
        "algorithm: ", algorithm, " does not compute this convolution");
    const auto grad_weight = wgrad_by(a, grad_output, input, weight, g);
    TORCH_CHECK(grad_weight.defined(), "input: a sum was not finite");
    return grad_weight;
  }
  TORCH_CHECK_VALUE(false, "algorithm: expected direct, winograd2 or winograd4, got ", algorithm);
}

std::string conv_wgrad_algorithm(const at::Tensor& grad_output, const at::Tensor& input,
                                 const at::Tensor& weight, int64_t stride, int64_t padding,
                                 int64_t dilation) {
  const auto g = geometry_of(input, weight, stride, padding, dilation);
  return name_of(choose(grad_output, input, weight, g));
}

}  // namespace fastres::cpu
