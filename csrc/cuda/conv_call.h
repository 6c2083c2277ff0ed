// How tensors become what the convolutions' kernels are given, and which kernel is given them.
#pragma once

#include "bn_relu_host.h"
#include "conv.h"
#include "conv_fprop.h"

namespace fastres::cuda {

ConvShape conv_shape_of(at::IntArrayRef input, at::IntArrayRef weight, const cpu::ConvGeometry& g);

// Dense in channels_last, as the kernels see it, and on a boundary of 16 bytes.
at::Tensor operand(const at::Tensor& t);

// Whether the project has kernels for values like these, and 32 bits can count an image's.
bool has_own_values(const at::Tensor& input);

enum class ConvKernel { kNone, kPortable, kSm90 };

// One launch of the convolution that serves on the device of `like`.
struct ConvCall {
  ConvShape shape;
  Epilogue epilogue;
  ConvKernel kernel;
  int multiprocessors, tile_k;

  ConvCall(const at::Tensor& like, const ConvShape& shape, Epilogue epilogue,
           bool prologue = false);

  bool serves() const { return kernel != ConvKernel::kNone; }

  // Whether its prologue is faster than a pass before it. Of the portable kernel nothing is known.
  bool takes_prologue() const {
    return kernel != ConvKernel::kSm90 || fprop_takes_prologue(shape, tile_k, multiprocessors);
  }

  // Of statistics, for every filter.
  int segments() const { return ConvTiles::of(shape, tile_k).down; }

  void operator()(const at::Tensor& like, const ConvFprop& f) const;
};

}  // namespace fastres::cuda
