// How the operators' arguments become what the convolution kernels are given.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv_shape.h"

namespace fastres::cpu {

struct ConvGeometry {
  Pair stride, padding, dilation;
  int64_t groups;

  bool operator==(const ConvGeometry&) const = default;
};

// Two integers, or one for both dimensions.
Pair check_pair(at::IntArrayRef values, const char* name, int64_t least);

ConvGeometry check_geometry(at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups);

// A parameter of a convolution: on input's device, in its dtype or that of its accumulators.
void check_parameter(const at::Tensor& t, const char* name, const at::Tensor& input);

// (N, K, P, Q); throws where the filters reach beyond the padded input.
std::array<int64_t, 4> output_size(const at::Tensor& input, const at::Tensor& weight,
                                   const ConvGeometry& g);

// As the functions for tests take it: alike in both dimensions, in as many groups as the shapes
// say.
ConvGeometry geometry_of(const at::Tensor& input, const at::Tensor& weight, int64_t stride,
                         int64_t padding, int64_t dilation);

ConvShape shape_of(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& g);

// t in channels_last, with the strides to show it: a tensor with one channel or one pixel is dense
// in either format, and ATen takes its slow path unless the strides say channels_last.
at::Tensor in_channels_last(const at::Tensor& t);

// ATen brings the weights to the activations' memory format in every call. Where the weights are
// larger than the activations, as behind the last maps of small images, those go to theirs instead.
bool follows_weights(const at::Tensor& weight, int64_t activations);

}  // namespace fastres::cpu
