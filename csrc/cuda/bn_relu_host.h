// How tensors become what the kernels of bn_relu are given.
#pragma once

#include <ATen/ops/empty.h>

#include <array>
#include <tuple>

#include "../bn_relu_checks.h"
#include "bn_relu.h"
#include "launch.h"

namespace fastres::cuda {

// bn_relu of checked arguments. `moments`: those of the input, where they are known already, in
// `segments` > 0 for each channel.
std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu_of(const at::Tensor& input,
                                                          const std::optional<at::Tensor>& residual,
                                                          const BnReluArguments& arguments,
                                                          const at::Tensor& moments,
                                                          int64_t segments);

// Its mean and invstd alone.
std::tuple<at::Tensor, at::Tensor> bn_relu_moments_of(const at::Tensor& input,
                                                      const BnReluArguments& arguments,
                                                      const at::Tensor& moments, int64_t segments);

// bn_relu_backward of checked arguments. `sums`: those of grad_output, which is masked already and
// asks for no gradient of a residual, where they are known, in `segments` > 0 for each channel.
struct BnReluBackwardArguments {
  const at::Tensor &grad_output, &input;
  const std::optional<at::Tensor>&output, &weight, &bias;
  const at::Tensor &save_mean, &save_invstd;
  bool training;
  Mask mask;
  std::array<bool, 3> output_mask;
};
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> bn_relu_backward_of(
    const BnReluBackwardArguments& arguments, const at::Tensor& sums, int64_t segments);

inline Activation activation_of(const at::Tensor& input, at::MemoryFormat format) {
  return Activation::of(input.size(0), input.size(1), input.size(2) * input.size(3),
                        format == at::MemoryFormat::ChannelsLast);
}

inline at::Tensor empty_vector(const at::Tensor& input) {
  return at::empty({input.size(1)}, input.options().dtype(accumulate_dtype(input.scalar_type())));
}

}  // namespace fastres::cuda
