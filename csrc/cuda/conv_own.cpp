#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>

#include "bn_relu_host.h"
#include "conv.h"
#include "conv_fprop.h"
#include "conv_wgrad.h"

namespace fastres::cuda {
namespace {

ConvShape conv_shape_of(const at::Tensor& x, const at::Tensor& weight, const cpu::ConvGeometry& g) {
  const auto i = [](int64_t value) { return static_cast<int>(value); };
  const auto pair = [&](const cpu::Pair& p) { return Pair{i(p[0]), i(p[1])}; };
  return {x.size(0),         i(x.size(2)),      i(x.size(3)),   i(x.size(1)),    i(weight.size(0)),
          i(weight.size(2)), i(weight.size(3)), pair(g.stride), pair(g.padding), pair(g.dilation)};
}

bool is_sm90(const at::Tensor& t) {
  return has_conv_fprop() && attribute(cudaDevAttrComputeCapabilityMajor, t) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, t) == 0;
}

// Dense in channels_last, as the tensor maps see it, and on a boundary of 16 bytes.
at::Tensor operand(const at::Tensor& t) {
  const auto dense = cpu::in_channels_last(t);
  return aligned(dense.const_data_ptr()) ? dense : cpu::in_channels_last(dense.clone());
}

struct Call {
  at::Tensor x, weight, residual, output;
  ConvShape shape;
  int multiprocessors;

  Call(const at::Tensor& input, const at::Tensor& filters, const cpu::ConvGeometry& g,
       const std::optional<at::Tensor>& skip)
      : x(operand(input)),
        weight(operand(filters.to(input.scalar_type()))),
        residual(given(skip) ? operand(*skip) : at::Tensor()),
        output(at::empty(cpu::output_size(input, filters, g),
                         input.options().memory_format(at::MemoryFormat::ChannelsLast))),
        shape(conv_shape_of(x, weight, g)),
        multiprocessors(cuda::multiprocessors(input)) {}

  void run(Epilogue kind, const ConvEpilogue& epilogue, int tile) const {
    launch_conv_fprop(current_stream(x), x.scalar_type() == at::kBFloat16, kind, shape,
                      {x.const_data_ptr(), weight.const_data_ptr(), data<const void>(residual),
                       output.mutable_data_ptr(), epilogue},
                      tile, multiprocessors);
  }
};

}  // namespace

bool own_conv_serves(const at::Tensor& input, const at::Tensor& weight,
                     const cpu::ConvGeometry& g) {
  const auto dtype = input.scalar_type();
  if ((dtype != at::kBFloat16 && dtype != at::kHalf) || g.groups != 1) return false;
  if (input.numel() == 0 || input.numel() / input.size(0) > INT32_MAX) return false;
  return is_sm90(input) && fits_im2col(conv_shape_of(input, weight, g));
}

at::Tensor own_conv(const at::Tensor& input, const at::Tensor& weight, const cpu::ConvGeometry& g,
                    const at::Tensor& scale, const at::Tensor& shift,
                    const std::optional<at::Tensor>& residual, bool relu) {
  const Call call(input, weight, g, residual);
  call.run(Epilogue::kApply,
           {data<const float>(scale), data<const float>(shift), given(residual), relu, nullptr},
           choose_tile_k(call.shape, call.multiprocessors));
  return call.output;
}

ConvMoments own_conv_moments(const at::Tensor& input, const at::Tensor& weight,
                             const cpu::ConvGeometry& g) {
  const Call call(input, weight, g, std::nullopt);
  const int tile = choose_tile_k(call.shape, call.multiprocessors);
  const int64_t segments = ConvTiles::of(call.shape, tile).down;
  const auto moments = workspace<Moments<float>>(input, call.shape.k * segments);
  call.run(Epilogue::kMoments, {nullptr, nullptr, false, false, data<Moments<float>>(moments)},
           tile);
  return {call.output, moments, segments};
}

at::Tensor own_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                     const at::Tensor& weight, const cpu::ConvGeometry& g) {
  const auto x = operand(input), dy = operand(grad_output);
  const ConvShape shape = conv_shape_of(x, weight, g);
  const int chip = multiprocessors(x);
  const auto result =
      at::empty(weight.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const auto partial = at::empty({WgradTiles::of(shape, chip).shares * result.numel()},
                                 x.options().dtype(at::kFloat));
  launch_conv_wgrad(
      current_stream(x), x.scalar_type() == at::kBFloat16, shape,
      {dy.const_data_ptr(), x.const_data_ptr(), data<float>(partial), result.mutable_data_ptr()},
      chip);
  return result;
}

at::Tensor vendor_conv(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, const cpu::ConvGeometry& g) {
  const auto dtype = input.scalar_type();
  const auto narrow = given(bias) ? std::optional<at::Tensor>(bias->to(dtype)) : std::nullopt;
  return at::conv2d(input, weight.to(dtype), narrow, g.stride, g.padding, g.dilation, g.groups);
}

at::MemoryFormat conv_format(const at::Tensor& input, const at::Tensor& weight) {
  const auto last = at::MemoryFormat::ChannelsLast;
  return output_format(input) == last || output_format(weight) == last
             ? last
             : at::MemoryFormat::Contiguous;
}

}  // namespace fastres::cuda
