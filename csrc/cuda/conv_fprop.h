// What the convolution's kernels are given, and how they are launched: free of torch and of device
// code.
#pragma once

#include "bn_relu.h"
#include "conv_plan.h"

namespace fastres::cuda {

// What becomes of the sums. kApply: y = act(sum * scale + shift + residual). kMoments: y = sum, and
// of every filter the moments of a tile's 128 values, as rounded in y.
enum class Epilogue { kApply, kMoments };

struct ConvEpilogue {
  const float *scale, *shift;  // K values; kApply; null: 1 and 0
  bool residual, relu;
  Moments<float>* moments;  // (K, tiles down); kMoments
};

// The arrays of one call, all on one device: activations dense in channels_last, filters (K, R, S,
// C). `moments` has room for K * tiles down.
struct ConvFprop {
  const void *input, *filter, *residual;
  void* output;
  ConvEpilogue epilogue;
};

// In conv_fprop.cu: a convolution whose shape fits_im2col(), in bfloat16 or float16, on sm_90.
// Whether this build has it.
bool has_conv_fprop();
void launch_conv_fprop(cudaStream_t stream, bool bfloat16, Epilogue epilogue,
                       const ConvShape& shape, const ConvFprop& f, int tile_k, int multiprocessors);

// Vectors of K values; conv_bias, weight and bias may be null.
template <typename A>
struct RunningBatchNorm {
  const A *conv_bias, *mean, *var, *weight, *bias;
  double eps;
};

// scale = weight / sqrt(var + eps), shift = (conv_bias - mean) * scale + bias; in conv_fprop.cu.
void launch_fold_batch_norm(cudaStream_t stream, const RunningBatchNorm<float>& bn,
                            int64_t channels, float* scale, float* shift);

}  // namespace fastres::cuda
