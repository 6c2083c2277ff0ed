#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>

#include "conv_call.h"
#include "conv_wgrad.h"

namespace fastres::cuda {
namespace {

bool is_sm90(const at::Tensor& t) {
  return has_conv_fprop() && attribute(cudaDevAttrComputeCapabilityMajor, t) == 9 &&
         attribute(cudaDevAttrComputeCapabilityMinor, t) == 0;
}

ConvKernel kernel_for(const at::Tensor& t, const ConvShape& shape) {
  if (is_sm90(t) && fits_im2col(shape)) return ConvKernel::kSm90;
  const bool portable = attribute(cudaDevAttrComputeCapabilityMajor, t) >= 8 && fits_packs(shape);
  return portable ? ConvKernel::kPortable : ConvKernel::kNone;
}

// The operands of a convolution forward, and where its output goes.
struct Forward {
  at::Tensor x, weight, residual, output;
  ConvCall call;

  Forward(const at::Tensor& input, const at::Tensor& filters, const cpu::ConvGeometry& g,
          const std::optional<at::Tensor>& skip, Epilogue epilogue, bool prologue = false)
      : x(operand(input)),
        weight(operand(filters.to(input.scalar_type()))),
        residual(given(skip) ? operand(*skip) : at::Tensor()),
        output(at::empty(cpu::output_size(input, filters, g),
                         input.options().memory_format(at::MemoryFormat::ChannelsLast))),
        call(x, conv_shape_of(x.sizes(), weight.sizes(), g), epilogue, prologue) {}

  void run(const ConvEpilogue& epilogue, const Vectors<float>& prologue = {}) const {
    call(x, {x.const_data_ptr(), weight.const_data_ptr(), data<const void>(residual),
             output.mutable_data_ptr(), PixelGrid::whole(), epilogue, prologue});
  }
};

}  // namespace

ConvShape conv_shape_of(at::IntArrayRef input, at::IntArrayRef weight, const cpu::ConvGeometry& g) {
  const auto i = [](int64_t value) { return static_cast<int>(value); };
  const auto pair = [&](const cpu::Pair& p) { return Pair{i(p[0]), i(p[1])}; };
  return {input[0],        i(input[2]),     i(input[3]),     i(input[1]),
          i(weight[0]),    i(weight[2]),    i(weight[3]),    pair(g.stride),
          pair(g.padding), pair(g.padding), pair(g.dilation)};
}

at::Tensor operand(const at::Tensor& t) {
  const auto dense = cpu::in_channels_last(t);
  return aligned(dense.const_data_ptr()) ? dense : cpu::in_channels_last(dense.clone());
}

bool has_own_values(const at::Tensor& t) {
  const auto dtype = t.scalar_type();
  return (dtype == at::kBFloat16 || dtype == at::kHalf) && t.numel() > 0 &&
         t.numel() / t.size(0) <= INT32_MAX;
}

ConvCall::ConvCall(const at::Tensor& like, const ConvShape& shape, Epilogue epilogue, bool prologue)
    : shape(shape),
      epilogue(epilogue),
      kernel(kernel_for(like, shape)),
      multiprocessors(cuda::multiprocessors(like)),
      tile_k(choose_tile_k(shape, multiprocessors,
                           kernel == ConvKernel::kSm90 ? most_tile_k(epilogue, prologue) : 128,
                           kernel == ConvKernel::kSm90)) {}

void ConvCall::operator()(const at::Tensor& like, const ConvFprop& f) const {
  const auto stream = current_stream(like);
  const bool bfloat16 = like.scalar_type() == at::kBFloat16;
  if (kernel == ConvKernel::kSm90)
    launch_conv_fprop(stream, bfloat16, epilogue, shape, f, tile_k, multiprocessors);
  else
    launch_conv_portable(stream, bfloat16, epilogue, shape, f, tile_k);
}

bool own_conv_serves(const at::Tensor& input, const at::Tensor& weight,
                     const cpu::ConvGeometry& g) {
  if (!has_own_values(input) || g.groups != 1) return false;
  return ConvCall(input, conv_shape_of(input.sizes(), weight.sizes(), g), Epilogue::kApply)
      .serves();
}

at::Tensor own_conv(const at::Tensor& input, const at::Tensor& weight, const cpu::ConvGeometry& g,
                    const RunningBatchNorm& norm, const std::optional<at::Tensor>& residual,
                    bool relu) {
  const Forward forward(input, weight, g, residual, Epilogue::kApply);
  ConvEpilogue e{};
  e.norm = norm, e.relu = relu;
  forward.run(e);
  return forward.output;
}

ConvMoments own_conv_moments(const at::Tensor& input, const at::Tensor& weight,
                             const cpu::ConvGeometry& g,
                             const std::optional<BatchNormBefore>& before) {
  const ConvShape shape = conv_shape_of(input.sizes(), weight.sizes(), g);
  if (before && !ConvCall(input, shape, Epilogue::kMoments, /*prologue=*/true).takes_prologue()) {
    return own_conv_moments(activated(input, before), weight, g);
  }
  const Forward forward(input, weight, g, std::nullopt, Epilogue::kMoments, before.has_value());
  ConvEpilogue e{};
  e.segments = forward.call.segments();
  const auto moments = workspace<Moments<float>>(input, int64_t(forward.call.shape.k) * e.segments);
  e.moments = data<Moments<float>>(moments);
  forward.run(e, NormVectors(before));
  return {forward.output, moments, e.segments};
}

bool own_wgrad_serves(const at::Tensor& input, const at::Tensor& weight,
                      const cpu::ConvGeometry& g) {
  return has_own_values(input) && g.groups == 1 && is_sm90(input) &&
         fits_im2col(conv_shape_of(input.sizes(), weight.sizes(), g));
}

at::Tensor own_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                     const at::Tensor& weight, const cpu::ConvGeometry& g,
                     const std::optional<BatchNormBefore>& before) {
  const auto dy = operand(grad_output);
  const ConvShape shape = conv_shape_of(input.sizes(), weight.sizes(), g);
  const int chip = multiprocessors(input);
  const bool prologue = before && wgrad_takes_prologue(shape, chip);
  const auto x = operand(prologue ? input : activated(input, before));
  const NormVectors norm(prologue ? before : std::nullopt);
  const auto result =
      at::empty(weight.sizes(), x.options().memory_format(at::MemoryFormat::ChannelsLast));
  const auto partial = at::empty({WgradTiles::of(shape, chip).shares * result.numel()},
                                 x.options().dtype(at::kFloat));
  launch_conv_wgrad(current_stream(x), x.scalar_type() == at::kBFloat16, shape,
                    {dy.const_data_ptr(), x.const_data_ptr(), data<float>(partial),
                     result.mutable_data_ptr(), norm},
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
