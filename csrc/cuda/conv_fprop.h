// What the convolution's kernels are given, and how they are launched: free of torch and of device
// code.
#pragma once

#include "bn_relu.h"
#include "conv_plan.h"

namespace fastres::cuda {

// What becomes of the sums.
// kApply: y = act(batch_norm(sum + bias) + residual), by running statistics.
// kMoments: y = sum, and of every filter the moments of a tile's 128 values, as rounded in y.
// kMask: y = g, the sum where the ReLU of a batch norm of x let pass and 0 elsewhere; and of every
//   filter the sums over a tile of g and of g * (x - mean), before they are rounded: what
//   bn_relu_backward begins with.
enum class Epilogue { kApply, kMoments, kMask };

// Filters of a tile on sm_90 at most: batch norm, before or behind, leaves fewer registers.
constexpr int most_tile_k(Epilogue epilogue, bool prologue) {
  return prologue || epilogue == Epilogue::kMask ? 128 : 256;
}

// f(epilogue) as a constant.
template <typename F>
void with_epilogue(Epilogue epilogue, F f) {
  if (epilogue == Epilogue::kApply)
    f(std::integral_constant<Epilogue, Epilogue::kApply>());
  else if (epilogue == Epilogue::kMoments)
    f(std::integral_constant<Epilogue, Epilogue::kMoments>());
  else
    f(std::integral_constant<Epilogue, Epilogue::kMask>());
}

// K values each, or null: without a variance there is no batch norm, but perhaps a bias.
struct RunningBatchNorm {
  const float *conv_bias, *mean, *var, *weight, *bias;
  float eps;
};

struct ConvEpilogue {
  RunningBatchNorm norm;  // kApply
  Vectors<float> behind;  // K values; kMask
  bool relu;
  Moments<float>* moments;  // (K, segments); kMoments
  Sums<float>* sums;        // (K, segments); kMask
  int segments, first;      // that a filter has, and the first tile's
};

// The arrays of one call, all on one device: activations dense in channels_last, filters (K, R, S,
// C). `beside`: what the epilogue reads, like the output; kApply: the residual, or null; kMask: x.
struct ConvFprop {
  const void *input, *filter;
  const void* beside;
  void* output;
  PixelGrid grid;  // of the output and what lies beside it
  ConvEpilogue epilogue;
  Vectors<float> prologue = {};  // kMoments, C values: of relu(batch_norm(input)), or null
};

// In conv_fprop.cu: a convolution whose shape fits_im2col(), in bfloat16 or float16, on sm_90.
// Whether this build has it.
bool has_conv_fprop();
void launch_conv_fprop(cudaStream_t stream, bool bfloat16, Epilogue epilogue,
                       const ConvShape& shape, const ConvFprop& f, int tile_k, int multiprocessors);

// In conv_fprop_sm80.cu: a convolution whose shape fits_packs(), likewise, on sm_80 and later;
// tiles of 64 or 128 filters.
void launch_conv_portable(cudaStream_t stream, bool bfloat16, Epilogue epilogue,
                          const ConvShape& shape, const ConvFprop& f, int tile_k);

}  // namespace fastres::cuda
