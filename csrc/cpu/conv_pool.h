// A convolution with a max-pool behind it, band by band of its rows: what the pool reads is still
// in the core's cache, and never anywhere else.
#pragma once

#include "capability.h"
#include "conv_plan.h"
#include "max_pool.h"

namespace fastres::cpu {

// max_pool(run_conv); operands.output has the pool's size. False where Winograd's sums were not
// finite: then the output is to be computed directly.
template <typename T>
bool run_pooled_conv(const ConvShape& shape, ConvAlgorithm algorithm,
                     const ConvOperands<T>& operands, const MaxPool& pool);

template <typename T>
struct PoolKernels {
  // The maxima of a window's rows, at `columns` windows in a row: input begins with the first of
  // them, of shape.q pixels of shape.k values.
  void (*row)(const ConvShape& shape, const MaxPool& pool, const T* input, int64_t rows,
              int64_t columns, T* output);
};

FASTRES_DECLARE_KERNELS(PoolKernels, pool_kernels)

}  // namespace fastres::cpu
