// Convolutions of few pixels as products of matrices by ATen (MKL's or oneDNN's), which are ahead
// of oneDNN's convolutions there: small maps leave those little to share out.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv_arguments.h"

namespace fastres::cpu {

enum class Pass { kFprop, kDgrad, kWgrad };

// Whether a product does this pass faster. Of the filters it takes those of one tap, at any
// stride; wgrad takes any in bfloat16.
bool is_product(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& g,
                Pass pass);

// The convolution, and its gradients by input and by weight, in channels_last.
at::Tensor product_fprop(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& g);
at::Tensor product_dgrad(const at::Tensor& grad_output, const at::Tensor& input,
                         const at::Tensor& weight, const ConvGeometry& g);
at::Tensor product_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                         const at::Tensor& weight, const ConvGeometry& g);

}  // namespace fastres::cpu
