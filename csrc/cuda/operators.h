// The CUDA operators, as module.cpp registers them. Semantics: the schemas in fastres/ops.py.
#pragma once

#include <ATen/core/Tensor.h>

namespace fastres::cuda {

at::Tensor add_relu(const at::Tensor& input, const at::Tensor& residual);

at::Tensor add_relu_backward(const at::Tensor& grad_output, const at::Tensor& output);

}  // namespace fastres::cuda
