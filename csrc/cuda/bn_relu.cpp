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

using OptionalTensor = std::optional<at::Tensor>;

// Statistics into mean and invstd where they are `asked` for, in `segments` > 0 `known` moments for
// each channel or of the input; then the output, where it is defined. x: dense in `format`.
void run(const at::Tensor& x, const OptionalTensor& residual, const at::Tensor& output,
         const at::Tensor& mean, const at::Tensor& invstd, const BnReluArguments& bn, bool asked,
         at::MemoryFormat format, const at::Tensor& known, int64_t segments) {
  const auto r = given(residual) ? residual->contiguous(format) : at::Tensor();
  const auto a = activation_of(x, format);
  const int chip = multiprocessors(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "bn_relu", [&] {
    using T = device_t<scalar_t>;
    using A = acc_t<T>;
    const auto m = asked ? mean : vector<A>(mean), i = asked ? invstd : vector<A>(invstd);
    const auto w = vector<A>(bn.weight), b = vector<A>(bn.bias);
    const auto mean_of_all = updated<A>(bn.running_mean), var_of_all = updated<A>(bn.running_var);
    BnRelu<T> call{data<const T>(x),
                   data<const T>(r),
                   data<T>(output),
                   {data<const A>(m), data<const A>(i), data<const A>(w), data<const A>(b)},
                   {},
                   nullptr,
                   segments,
                   bn.training,
                   bn.relu};
    if (asked) {
      call.statistics = {data<A>(mean),       data<A>(invstd), data<A>(mean_of_all),
                         data<A>(var_of_all), bn.momentum,     bn.eps};
    }
    auto moments = known;
    if (asked && bn.training && segments == 0) {
      moments = workspace<Moments<A>>(x, bn_relu_moments_size<T>(a, all_aligned(call), chip));
    }
    call.moments = data<Moments<A>>(moments);
    launch_bn_relu(current_stream(x), a, call, chip);
    if (!asked || !bn.training) return;
    store_updated(mean_of_all, bn.running_mean);
    store_updated(var_of_all, bn.running_var);
  });
}

// Statistics of nothing.
void fill_statistics(const at::Tensor& mean, const at::Tensor& invstd, const BnReluArguments& bn) {
  mean.fill_(NAN);
  invstd.fill_(NAN);
  if (!bn.training) mean.copy_(*bn.running_mean), invstd.copy_(*bn.running_var);
  if (!bn.training) invstd.add_(bn.eps).rsqrt_();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu_of(const at::Tensor& input,
                                                          const OptionalTensor& residual,
                                                          const BnReluArguments& bn,
                                                          const at::Tensor& known,
                                                          int64_t segments) {
  const auto format = output_format(input);
  auto output = empty_in(input, format);
  auto mean = empty_vector(input), invstd = empty_vector(input);
  if (input.numel() == 0)
    fill_statistics(mean, invstd, bn);
  else
    run(input.contiguous(format), residual, output, mean, invstd, bn, /*asked=*/true, format, known,
        segments);
  return {output, mean, invstd};
}

std::tuple<at::Tensor, at::Tensor> bn_relu_moments_of(const at::Tensor& input,
                                                      const BnReluArguments& bn,
                                                      const at::Tensor& known, int64_t segments) {
  const auto format = output_format(input);
  auto mean = empty_vector(input), invstd = empty_vector(input);
  if (input.numel() == 0)
    fill_statistics(mean, invstd, bn);
  else
    run(input.contiguous(format), std::nullopt, {}, mean, invstd, bn, /*asked=*/true, format, known,
        segments);
  return {mean, invstd};
}

std::tuple<at::Tensor, at::Tensor> bn_relu_moments(const at::Tensor& input,
                                                   const OptionalTensor& running_mean,
                                                   const OptionalTensor& running_var,
                                                   double momentum, double eps) {
  const OptionalTensor none;
  const BnReluArguments bn{running_mean,      running_var, none, none,
                           /*training=*/true, momentum,    eps,  /*relu=*/false};
  check_bn_relu(input, std::nullopt, bn, at::kCUDA);
  const Below below(input.device());
  return bn_relu_moments_of(input, bn, {}, 0);
}

at::Tensor bn_relu_apply(const at::Tensor& input, const OptionalTensor& residual,
                         const at::Tensor& mean, const at::Tensor& invstd,
                         const OptionalTensor& weight, const OptionalTensor& bias, bool relu) {
  check_bn_relu_apply(input, residual, mean, invstd, weight, bias, at::kCUDA);
  const Below below(input.device());
  const auto format = output_format(input);
  auto output = empty_in(input, format);
  const OptionalTensor none;
  const BnReluArguments bn{none, none, weight, bias, /*training=*/true, 0, 0, relu};
  if (input.numel() > 0)
    run(input.contiguous(format), residual, output, mean, invstd, bn, /*asked=*/false, format, {},
        0);
  return output;
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
