// Kernels of add_relu: flat runs of n elements.
#pragma once

#include "activations.h"
#include "capability.h"

namespace fastres::cpu {

template <typename T>
struct AddReluKernels {
  // output = relu(input + residual)
  void (*forward)(const T* input, const T* residual, T* output, int64_t n);
  // grad = grad_output where !(output <= 0), else 0
  void (*backward)(const T* grad_output, const T* output, T* grad, int64_t n);
};

FASTRES_DECLARE_KERNELS(AddReluKernels, add_relu_kernels)

}  // namespace fastres::cpu
