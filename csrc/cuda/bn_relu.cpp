#include <ATen/Dispatch.h>

#include "bn_relu_host.h"
#include "operators.h"

namespace fastres::cuda {
namespace {

// The vector that a kernel updates in place of `running`, which may have another dtype or strides.
template <typename A>
at::Tensor updated(const std::optional<at::Tensor>& running) {
  return given(running) ? vector<A>(*running) : at::Tensor();
}

void store_updated(const at::Tensor& vector, const std::optional<at::Tensor>& running) {
  if (!vector.defined()) return;
  if (vector.is_same(*running))
    running->unsafeGetTensorImpl()->bump_version();
  else
    running->copy_(vector);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu_of(const at::Tensor& input,
                                                          const std::optional<at::Tensor>& residual,
                                                          const BnReluArguments& bn,
                                                          const at::Tensor& known,
                                                          int64_t segments) {
  const auto format = output_format(input);
  const auto x = input.contiguous(format);
  const auto r = given(residual) ? residual->contiguous(format) : at::Tensor();
  auto output = empty_in(input, format);
  auto mean = empty_vector(input), invstd = empty_vector(input);
  if (input.numel() == 0) {  // statistics of nothing
    mean.fill_(NAN);
    invstd.fill_(NAN);
    if (!bn.training) mean.copy_(*bn.running_mean), invstd.copy_(*bn.running_var);
    if (!bn.training) invstd.add_(bn.eps).rsqrt_();
    return {output, mean, invstd};
  }
  const auto a = activation_of(input, format);
  const int chip = multiprocessors(input);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "bn_relu", [&] {
    using T = device_t<scalar_t>;
    using A = acc_t<T>;
    const auto w = vector<A>(bn.weight), b = vector<A>(bn.bias);
    const auto mean_of_all = updated<A>(bn.running_mean), var_of_all = updated<A>(bn.running_var);
    BnRelu<T> call{data<const T>(x),
                   data<const T>(r),
                   data<T>(output),
                   {data<A>(mean), data<A>(invstd), data<const A>(w), data<const A>(b)},
                   {data<A>(mean), data<A>(invstd), data<A>(mean_of_all), data<A>(var_of_all),
                    bn.momentum, bn.eps},
                   nullptr,
                   segments,
                   bn.training,
                   bn.relu};
    auto moments = known;
    if (bn.training && segments == 0) {
      moments = workspace<Moments<A>>(input, bn_relu_moments_size<T>(a, all_aligned(call), chip));
    }
    call.moments = data<Moments<A>>(moments);
    launch_bn_relu(current_stream(input), a, call, chip);
    if (!bn.training) return;
    store_updated(mean_of_all, bn.running_mean);
    store_updated(var_of_all, bn.running_var);
  });
  return {output, mean, invstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu(
    const at::Tensor& input, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, bool training,
    double momentum, double eps, bool relu) {
  const BnReluArguments bn{running_mean, running_var, weight, bias, training, momentum, eps, relu};
  check_bn_relu(input, residual, bn, at::kCUDA);
  const Below below(input.device());
  return bn_relu_of(input, residual, bn, {}, 0);
}

}  // namespace fastres::cuda
