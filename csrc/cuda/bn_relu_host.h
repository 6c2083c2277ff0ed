// How tensors become what the kernels of bn_relu are given.
#pragma once

#include <ATen/ops/empty.h>

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

inline Activation activation_of(const at::Tensor& input, at::MemoryFormat format) {
  return Activation::of(input.size(0), input.size(1), input.size(2) * input.size(3),
                        format == at::MemoryFormat::ChannelsLast);
}

inline at::Tensor empty_vector(const at::Tensor& input) {
  return at::empty({input.size(1)}, input.options().dtype(accumulate_dtype(input.scalar_type())));
}

}  // namespace fastres::cuda
