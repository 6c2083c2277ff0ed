// The weight's gradient as a product over pixels: (K x pixels) times (pixels x R S C).
#pragma once

#include <ATen/core/Tensor.h>

#include "conv_shape.h"

namespace fastres::cpu {

// Whether its kernel can: dense filters, and channels that fill vectors.
bool can_compute_direct_wgrad(const ConvShape& shape);

// Whether it is ahead of the libraries' convolution: `bf16` for operands of that type.
bool choose_direct_wgrad(const ConvShape& shape, bool bf16);

// For float32 and bfloat16: in their dtype, and in channels_last. How the sums are rounded depends
// on the number of threads, as it does in oneDNN.
at::Tensor direct_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                        const ConvShape& shape);

}  // namespace fastres::cpu
