#include "add_relu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "../checks.h"
#include "operators.h"
#include "pooled.h"

namespace fastres::cpu {
namespace {

// Elements that are worth a thread of their own, as in ATen's element-wise kernels.
constexpr int64_t kGrain = 32768;

}  // namespace

at::Tensor add_relu(const at::Tensor& input, const at::Tensor& residual) {
  check_activation(input, "input", at::kCPU);
  check_like(residual, "residual", input, "input");
  const auto format = output_format(input);
  const auto a = input.contiguous(format), b = residual.contiguous(format);
  auto output = empty_output(input, format);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "add_relu", [&] {
    static const auto kernels = FASTRES_SELECT_KERNELS(add_relu_kernels, scalar_t);
    const auto* pa = a.const_data_ptr<scalar_t>();
    const auto* pb = b.const_data_ptr<scalar_t>();
    auto* out = output.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, output.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernels.forward(pa + begin, pb + begin, out + begin, end - begin);
    });
  });
  return output;
}

at::Tensor add_relu_backward(const at::Tensor& grad_output, const at::Tensor& output) {
  check_tensor(output, "output", at::kCPU);
  check_like(grad_output, "grad_output", output, "output");
  const auto format = output_format(output);
  const auto g = grad_output.contiguous(format), y = output.contiguous(format);
  auto grad = empty_output(output, format);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, output.scalar_type(), "add_relu_backward", [&] {
        static const auto kernels = FASTRES_SELECT_KERNELS(add_relu_kernels, scalar_t);
        const auto* pg = g.const_data_ptr<scalar_t>();
        const auto* py = y.const_data_ptr<scalar_t>();
        auto* out = grad.mutable_data_ptr<scalar_t>();
        at::parallel_for(0, grad.numel(), kGrain, [&](int64_t begin, int64_t end) {
          kernels.backward(pg + begin, py + begin, out + begin, end - begin);
        });
      });
  return grad;
}

}  // namespace fastres::cpu
