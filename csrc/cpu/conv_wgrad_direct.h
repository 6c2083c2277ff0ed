// The weight's gradient by the project's own kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv_arguments.h"

namespace fastres::cpu {

// Whether they can: dense filters, and channels that fill vectors.
bool can_compute_direct_wgrad(const at::Tensor& input, const at::Tensor& weight,
                              const ConvGeometry& g);

// In the dtype of the weight and in channels_last.
at::Tensor direct_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                        const at::Tensor& weight, const ConvGeometry& g);

}  // namespace fastres::cpu
