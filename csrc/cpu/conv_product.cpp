#include "conv_product.h"

#include <ATen/Context.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/mm.h>

#include <limits>

#include "capability.h"
#include "pooled.h"

namespace fastres::cpu {
namespace {

// Pixels of the output up to which products are ahead. Measured in float32 on a Xeon and on Zen 4,
// where MKL's are behind by 4 to 10 % at 1568 pixels; in bfloat16, where the product is oneDNN's,
// too, on Zen 4: a ResNet-50's last maps of 8 images, 392 pixels, take 0.40 to 0.96 of the
// convolution's time. At 1568 the weight's gradient took 0.85 of it by itself, but a block that was
// trained with it 1.05 of the block's.
int64_t most_pixels(at::ScalarType dtype) {
  if (dtype == at::kFloat) return is_intel() ? 2048 : 1024;
  const bool measured = dtype == at::kBFloat16 && bfloat16_unit() == Bfloat16Unit::kVector &&
                        !is_intel() && at::globalContext().userEnabledMkldnn();
  return measured ? 512 : 0;
}

// Pixels up to which the weight's gradient is ahead although the taps are gathered first.
int64_t most_gathered_pixels(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? most_pixels(dtype) : 0;
}

bool has_one_tap(const at::Tensor& weight, const ConvGeometry& g) {
  return weight.size(2) == 1 && weight.size(3) == 1 && g.padding == Pair{0, 0};
}

// (pixels, channels), without a copy where t is in channels_last.
at::Tensor as_matrix(const at::Tensor& t) {
  return t.permute({0, 2, 3, 1}).reshape({-1, t.size(1)});
}

// The way back: an activation of n maps of h x w pixels in channels_last.
at::Tensor as_maps(const at::Tensor& matrix, int64_t n, int64_t h, int64_t w) {
  return matrix.view({n, h, w, matrix.size(1)}).permute({0, 3, 1, 2});
}

// Every stride-th pixel, as a view.
at::Tensor strided(const at::Tensor& t, const ConvGeometry& g) {
  constexpr int64_t kEnd = std::numeric_limits<int64_t>::max();
  return t.slice(2, 0, kEnd, g.stride[0]).slice(3, 0, kEnd, g.stride[1]);
}

// What the filters meet at every pixel of the output: (pixels, R x S x C).
at::Tensor rows_of(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& g) {
  if (has_one_tap(weight, g)) return as_matrix(strided(input, g));
  const auto size = output_size(input, weight, g);
  const auto padded = at::constant_pad_nd(in_channels_last(input),
                                          {g.padding[1], g.padding[1], g.padding[0], g.padding[0]});
  const auto x = padded.permute({0, 2, 3, 1}).contiguous();
  const int64_t c = x.size(3), r = weight.size(2), s = weight.size(3);
  const auto taps = x.as_strided({size[0], size[2], size[3], r, s, c},
                                 {x.stride(0), x.stride(1) * g.stride[0], x.stride(2) * g.stride[1],
                                  x.stride(1) * g.dilation[0], x.stride(2) * g.dilation[1], 1});
  return taps.reshape({-1, r * s * c});
}

}  // namespace

bool is_product(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& g,
                Pass pass) {
  if (g.groups != 1 || weight.size(1) == 1 || weight.size(0) == 1 || input.numel() == 0) {
    return false;
  }
  const auto dtype = input.scalar_type();
  if (dtype != weight.scalar_type()) return false;
  const bool one_tap = has_one_tap(weight, g);
  if (!one_tap && pass != Pass::kWgrad) return false;
  const auto size = output_size(input, weight, g);
  const int64_t most = one_tap ? most_pixels(dtype) : most_gathered_pixels(dtype);
  return size[0] * size[2] * size[3] <= most;
}

at::Tensor product_fprop(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& g) {
  const auto size = output_size(input, weight, g);
  const auto y = at::mm(rows_of(input, weight, g), weight.flatten(1).t());
  return as_maps(y, size[0], size[2], size[3]);
}

at::Tensor product_dgrad(const at::Tensor& grad_output, const at::Tensor& input,
                         const at::Tensor& weight, const ConvGeometry& g) {
  const auto product = as_maps(at::mm(as_matrix(grad_output), weight.flatten(1)), input.size(0),
                               grad_output.size(2), grad_output.size(3));
  if (g.stride == Pair{1, 1}) return product;
  const auto grad =
      empty_output(input.sizes(), input.scalar_type(), at::MemoryFormat::ChannelsLast);
  strided(grad.zero_(), g).copy_(product);
  return grad;
}

at::Tensor product_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                         const at::Tensor& weight, const ConvGeometry& g) {
  const auto product = at::mm(as_matrix(grad_output).t(), rows_of(input, weight, g));
  return product.view({weight.size(0), weight.size(2), weight.size(3), weight.size(1)})
      .permute({0, 3, 1, 2});
}

}  // namespace fastres::cpu
