// conv_bn_relu: batch norm as the scale and the shift of the convolution's epilogue.
#pragma once

#include "conv_fprop.h"

namespace fastres::cuda {

// scale = weight / sqrt(var + eps), shift = (conv_bias - mean) * scale + bias
template <typename A>
__global__ void __launch_bounds__(kThreads)
    fold_batch_norm(RunningBatchNorm<A> bn, int64_t channels, A* __restrict__ scale,
                    A* __restrict__ shift) {
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= channels) return;
  const double factor = (bn.weight ? bn.weight[k] : A(1)) / sqrt(bn.var[k] + bn.eps);
  const double conv_bias = bn.conv_bias ? bn.conv_bias[k] : A(0);
  scale[k] = A(factor);
  shift[k] = A((conv_bias - bn.mean[k]) * factor + (bn.bias ? bn.bias[k] : A(0)));
}

}  // namespace fastres::cuda
