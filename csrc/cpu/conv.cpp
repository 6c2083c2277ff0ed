// The convolutions of training, each by what does it fastest: the project's own kernels, a product
// of matrices, or ATen's convolution (oneDNN's).
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>

#include <string>
#include <utility>

#include "../checks.h"
#include "capability.h"
#include "conv_arguments.h"
#include "conv_pack.h"
#include "conv_product.h"
#include "conv_run.h"
#include "memory.h"
#include "operators.h"
#include "pooled.h"

namespace fastres::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Filters change with every step: they are packed anew for every call, into memory that stays.
const float* packed(const FilterView& filters, ConvAlgorithm algorithm) {
  static thread_local Scratch memory;
  float* const out = memory.of_size(packed_values(filters, algorithm));
  pack_filters(filters, algorithm, out);
  return out;
}

// What Winograd's kernels, those of groups and those of filters of one tap do faster than oneDNN,
// and in bfloat16 everything where the processor gains nothing by it; else kAten.
ConvAlgorithm algorithm_of(const at::Tensor& x, const at::Tensor& weight, const ConvShape& shape) {
  using enum ConvAlgorithm;
  const auto dtype = x.scalar_type();
  if (dtype != weight.scalar_type() || x.numel() == 0 || weight.numel() == 0) {
    return kAten;
  }
  const bool bf16 = dtype == at::kBFloat16 && bfloat16_unit() == Bfloat16Unit::kVector;
  if (dtype == at::kBFloat16 && bfloat16_unit() == Bfloat16Unit::kNone) {
    const auto algorithm =
        choose_algorithm(shape, {conv_panel(), /*onednn=*/false, /*pack=*/true, /*bf16=*/false});
    return is_own(algorithm) ? algorithm : kAten;
  }
  if (dtype != at::kFloat && !bf16) return kAten;
  const auto algorithm =
      choose_algorithm(shape, {conv_panel(), /*onednn=*/true, /*pack=*/true, bf16});
  // In bfloat16, on small maps, oneDNN finds everything in the cache and is ahead.
  const bool one_tap = shape.taps() == 1 && (!bf16 || shape.pixels() > kFewPixels);
  const bool own = one_tap || is_winograd(algorithm) || is_grouped(algorithm);
  return own && is_own(algorithm) ? algorithm : kAten;
}

template <typename T>
bool run_as(const at::Tensor& x, const FilterView& filters, const at::Tensor& bias,
            const ConvShape& shape, ConvAlgorithm algorithm, const at::Tensor& y) {
  return run_conv<T>(shape, algorithm,
                     {x.const_data_ptr<T>(), packed(filters, algorithm),
                      bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                      /*residual=*/nullptr, y.mutable_data_ptr<T>(), /*relu=*/false});
}

// False, and nothing of use in y, where a sum was not finite.
bool run(const at::Tensor& input, const FilterView& filters, const OptionalTensor& bias,
         const ConvShape& shape, ConvAlgorithm algorithm, const at::Tensor& y) {
  const auto x = in_channels_last(input);
  const auto shift = given(bias) ? bias->to(at::kFloat).contiguous() : at::Tensor();
  return x.scalar_type() == at::kFloat
             ? run_as<float>(x, filters, shift, shape, algorithm, y)
             : run_as<c10::BFloat16>(x, filters, shift, shape, algorithm, y);
}

at::Tensor empty_last(at::IntArrayRef size, const at::Tensor& like) {
  return empty_output(size, like.scalar_type(), at::MemoryFormat::ChannelsLast);
}

}  // namespace

at::Tensor conv(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                int64_t groups) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto aten = [&] {
    if (!follows_weights(weight, 2 * input.numel())) {
      return at::conv2d(input, weight, bias, stride, padding, dilation, groups);
    }
    return at::conv2d(input.contiguous(), weight, bias, stride, padding, dilation, groups)
        .contiguous(output_format(input));
  };
  if (input.dim() != 4 || weight.dim() != 4 || groups < 1 || weight.size(0) % groups != 0 ||
      input.size(1) != weight.size(1) * groups ||
      (given(bias) && bias->sizes() != weight.sizes().slice(0, 1))) {
    return aten();  // refused
  }
  const auto geometry = check_geometry(stride, padding, dilation, groups);
  const bool last = output_format(input) == at::MemoryFormat::ChannelsLast ||
                    output_format(weight) == at::MemoryFormat::ChannelsLast;
  const auto as_asked = [&](const at::Tensor& y) { return last ? y : y.contiguous(); };
  if (is_product(input, weight, geometry, Pass::kFprop) && !given(bias)) {
    return as_asked(product_fprop(input, weight, geometry));
  }
  const auto shape = shape_of(input, weight, geometry);
  const auto algorithm = algorithm_of(input, weight, shape);
  if (algorithm == ConvAlgorithm::kAten) return aten();
  const auto y = empty_last({shape.n, shape.k, shape.p, shape.q}, input);
  const auto wide = weight.to(at::kFloat);
  if (!run(input, filters_of(wide, groups), bias, shape, algorithm, y)) return aten();
  return as_asked(y);
}

at::Tensor conv_dgrad(const at::Tensor& grad_output, const at::Tensor& input,
                      const at::Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                      at::IntArrayRef dilation, int64_t groups) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto aten = [&] {
    const bool follow = follows_weights(weight, grad_output.numel() + input.numel());
    const auto y = std::get<0>(at::convolution_backward(
        follow ? grad_output.contiguous() : grad_output,
        follow ? empty_in(input, at::MemoryFormat::Contiguous) : input, weight, std::nullopt,
        stride, padding, dilation, /*transposed=*/false, {0, 0}, groups, {true, false, false}));
    return follow ? y.contiguous(output_format(input)) : y;
  };
  const auto g = check_geometry(stride, padding, dilation, groups);
  TORCH_CHECK(grad_output.sizes() == at::IntArrayRef(output_size(input, weight, g)),
              "grad_output: expected the shape of the convolution's output, got ",
              grad_output.sizes());
  const auto as_asked = [&](const at::Tensor& y) {
    return output_format(input) == at::MemoryFormat::ChannelsLast ? y : y.contiguous();
  };
  if (is_product(input, weight, g, Pass::kDgrad)) {
    return as_asked(product_dgrad(grad_output, input, weight, g));
  }
  constexpr Pair kOnes{1, 1};
  const Pair full{weight.size(2) - 1 - g.padding[0], weight.size(3) - 1 - g.padding[1]};
  if (g.stride != kOnes || g.dilation != kOnes || full[0] < 0 || full[1] < 0) {
    return aten();
  }
  // The same convolution from the output to the input: its filters are turned, its padding is what
  // was missing from a full one.
  auto shape = shape_of(input, weight, g);
  std::swap(shape.h, shape.p);
  std::swap(shape.w, shape.q);
  std::swap(shape.c, shape.k);
  shape.padding = full;
  const auto algorithm = algorithm_of(grad_output, weight, shape);
  if (algorithm == ConvAlgorithm::kAten) return aten();
  const auto y = empty_last(input.sizes(), input);
  const auto wide = weight.to(at::kFloat);
  if (!run(grad_output, turned(filters_of(wide, groups)), std::nullopt, shape, algorithm, y))
    return aten();
  return as_asked(y);
}

at::Tensor conv_by(const std::string& algorithm, const at::Tensor& input, const at::Tensor& weight,
                   const OptionalTensor& bias, int64_t stride, int64_t padding, int64_t dilation) {
  using enum ConvAlgorithm;
  const auto g = geometry_of(input, weight, stride, padding, dilation);
  const auto shape = shape_of(input, weight, g);
  const auto y = empty_last({shape.n, shape.k, shape.p, shape.q}, input);
  const auto wide = weight.to(at::kFloat);
  for (const auto a : {kDirect, kDirectBf16, kGrouped, kGroupedBf16, kWinograd2, kWinograd4,
                       kWinograd4Plain, kPolyphase, kPolyphasePlain}) {
    if (algorithm != name_of(a)) continue;
    const bool fits = channels_a_lane(a) == 1 || input.scalar_type() == at::kBFloat16;
    TORCH_CHECK_VALUE(fits && can_compute(a, shape), "algorithm: ", algorithm,
                      " does not compute this convolution");
    TORCH_CHECK(run(input, filters_of(wide, g.groups), bias, shape, a, y),
                "input: a sum was not finite");
    return y;
  }
  TORCH_CHECK_VALUE(
      false,
      "algorithm: expected direct, direct_bf16, grouped, grouped_bf16, winograd2, winograd4, "
      "winograd4_plain, polyphase or polyphase_plain, got ",
      algorithm);
}

std::string conv_algorithm(const at::Tensor& input, const at::Tensor& weight, int64_t stride,
                           int64_t padding, int64_t dilation, bool training) {
  const auto g = geometry_of(input, weight, stride, padding, dilation);
  const auto shape = shape_of(input, weight, g);
  return name_of(choose_algorithm(shape, {conv_panel(), /*onednn=*/true, training,
                                          /*bf16=*/input.scalar_type() == at::kBFloat16 &&
                                              bfloat16_unit() == Bfloat16Unit::kVector}));
}

}  // namespace fastres::cpu
