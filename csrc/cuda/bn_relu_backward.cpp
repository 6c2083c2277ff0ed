#include <ATen/Dispatch.h>

#include "bn_relu_host.h"
#include "operators.h"

namespace fastres::cuda {

using Tensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Tensors bn_relu_backward_of(const BnReluBackwardArguments& b, const at::Tensor& known,
                            int64_t segments) {
  const auto& input = b.input;
  const auto [want_input, want_residual, want_parameters] = b.output_mask;
  const auto format = output_format(input);
  const auto x = input.contiguous(format), dy = b.grad_output.contiguous(format);
  const auto y = b.mask == Mask::kFromOutput ? b.output->contiguous(format) : at::Tensor();
  const auto wanted = [&](bool want) { return want ? empty_in(input, format) : at::Tensor(); };
  const auto grad_input = wanted(want_input), grad_residual = wanted(want_residual);
  const auto per_channel = [&] { return want_parameters ? empty_vector(input) : at::Tensor(); };
  const auto grad_weight = per_channel(), grad_bias = per_channel();
  const auto given_or_empty = [](const at::Tensor& t, const at::Tensor& like) {
    return t.defined() ? t : at::empty({0}, like.options());
  };
  const auto results = std::make_tuple(
      given_or_empty(grad_input, input), given_or_empty(grad_residual, input),
      given_or_empty(grad_weight, b.save_mean), given_or_empty(grad_bias, b.save_mean));
  if (input.numel() == 0) {  // sums of nothing
    if (want_parameters) grad_weight.zero_(), grad_bias.zero_();
    return results;
  }
  const auto a = activation_of(input, format);
  const int chip = multiprocessors(input);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "bn_relu_backward", [&] {
        using T = device_t<scalar_t>;
        using A = acc_t<T>;
        const auto mean = vector<A>(b.save_mean), invstd = vector<A>(b.save_invstd);
        const auto w = vector<A>(b.weight), bias = vector<A>(b.bias);
        BnReluBackward<T> call{
            {data<const T>(dy), data<const T>(x), data<const T>(y), data<T>(grad_input),
             data<T>(grad_residual)},
            {data<const A>(mean), data<const A>(invstd), data<const A>(w), data<const A>(bias)},
            data<A>(grad_weight),
            data<A>(grad_bias),
            nullptr,
            segments,
            nullptr,
            b.mask,
            b.training};
        auto sums = known;
        if (segments == 0) {
          sums = workspace<Sums<A>>(
              input, bn_relu_moments_size<T>(a, all_aligned(call.activations), chip));
        }
        const auto slopes = workspace<Slopes<A>>(input, a.channels);
        call.sums = data<Sums<A>>(sums);
        call.slopes = data<Slopes<A>>(slopes);
        launch_bn_relu_backward(current_stream(input), a, call, chip);
      });
  return results;
}

Tensors bn_relu_backward(const at::Tensor& grad_output, const at::Tensor& input,
                         const std::optional<at::Tensor>& output,
                         const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const at::Tensor& save_mean,
                         const at::Tensor& save_invstd, bool training, bool relu,
                         std::array<bool, 3> output_mask) {
  check_bn_relu_backward(grad_output, input, output, weight, bias, save_mean, save_invstd,
                         at::kCUDA);
  const Below below(input.device());
  const Mask mask = !relu ? Mask::kNone : given(output) ? Mask::kFromOutput : Mask::kFromInput;
  return bn_relu_backward_of({grad_output, input, output, weight, bias, save_mean, save_invstd,
                              training, mask, output_mask},
                             {}, 0);
}

}  // namespace fastres::cuda
