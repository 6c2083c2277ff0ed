#include "bn_relu.cuh"

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

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu(
    const at::Tensor& input, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, bool training,
    double momentum, double eps, bool relu) {
  check_bn_relu(input, residual,
                {running_mean, running_var, weight, bias, training, momentum, eps, relu},
                at::kCUDA);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::DeviceGuard guard(input.device());
  const auto format = output_format(input);
  const auto x = input.contiguous(format);
  const auto r = given(residual) ? residual->contiguous(format) : at::Tensor();
  auto output = empty_in(input, format);
  auto mean = empty_vector(input), invstd = empty_vector(input);
  if (input.numel() == 0) {  // statistics of nothing
    mean.fill_(training ? NAN : 0);
    invstd.fill_(NAN);
    if (!training) mean.copy_(*running_mean);
    return {output, mean, invstd};
  }
  const auto a = activation_of(input, format);
  const int chip = multiprocessors(input.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "bn_relu", [&] {
    using T = device_t<scalar_t>;
    using A = acc_t<T>;
    const auto w = vector<A>(weight), b = vector<A>(bias);
    const auto mean_of_all = updated<A>(running_mean), var_of_all = updated<A>(running_var);
    BnRelu<T> call{
        data<const T>(x),
        data<const T>(r),
        data<T>(output),
        {data<A>(mean), data<A>(invstd), data<const A>(w), data<const A>(b)},
        {data<A>(mean), data<A>(invstd), data<A>(mean_of_all), data<A>(var_of_all), momentum, eps},
        nullptr,
        training,
        relu};
    const auto moments =
        training ? workspace<Moments<A>>(input, bn_relu_moments_size<T>(a, all_aligned(call), chip))
                 : at::Tensor();
    call.moments = data<Moments<A>>(moments);
    bn_relu_run(Queue("bn_relu", input.device()), a, call, chip);
    if (!training) return;
    store_updated(mean_of_all, running_mean);
    store_updated(var_of_all, running_var);
  });
  return {output, mean, invstd};
}

}  // namespace fastres::cuda
