// Kernels of mean_linear: the means of a map, and the product of few of them with a weight.
#pragma once

#include "activations.h"
#include "capability.h"

namespace fastres::cpu {

// y = x weight^T + bias: x (N, C) in rows of `stride` values, zeros behind the C-th, weight (K, C),
// output (N, K); bias may be null.
template <typename T>
struct LinearOperands {
  const acc_t<T>* x;
  int64_t n, c, k, stride;
  const T *weight, *bias;
  T* output;
};

template <typename T>
struct MeanLinearKernels {
  // mean[c] = sum over pixels of input[pixel][c] / pixels; whole vectors of `mean` are written.
  void (*mean)(const T* input, int64_t pixels, int64_t channels, acc_t<T>* mean);
  // The outputs [begin, end) of every row.
  void (*linear)(const LinearOperands<T>& operands, int64_t begin, int64_t end);
};

FASTRES_DECLARE_KERNELS(MeanLinearKernels, mean_linear_kernels)

}  // namespace fastres::cpu
