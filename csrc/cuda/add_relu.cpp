#include <ATen/Dispatch.h>

#include "../checks.h"
#include "add_relu.h"
#include "launch.h"
#include "operators.h"

namespace fastres::cuda {
namespace {

// f of two checked tensors of equal shape, dtype and device, in the memory format of `like`.
at::Tensor combine_tensors(const at::Tensor& a, const at::Tensor& b, const at::Tensor& like,
                           Combination f) {
  const Below below(like.device());
  const auto format = output_format(like);
  const auto x = a.contiguous(format), y = b.contiguous(format);
  auto out = empty_in(like, format);
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like.scalar_type(), "add_relu", [&] {
    using T = device_t<scalar_t>;
    launch_add_relu(current_stream(like), data<const T>(x), data<const T>(y), data<T>(out),
                    out.numel(), f);
  });
  return out;
}

}  // namespace

at::Tensor add_relu(const at::Tensor& input, const at::Tensor& residual) {
  check_tensor(input, "input", at::kCUDA);
  check_like(residual, "residual", input, "input");
  return combine_tensors(input, residual, input, Combination::kAddRelu);
}

at::Tensor add_relu_backward(const at::Tensor& grad_output, const at::Tensor& output) {
  check_tensor(output, "output", at::kCUDA);
  check_like(grad_output, "grad_output", output, "output");
  return combine_tensors(grad_output, output, output, Combination::kReluMask);
}

}  // namespace fastres::cuda
