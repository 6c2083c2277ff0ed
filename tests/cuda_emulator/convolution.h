// One convolution by one of csrc/cuda's kernels: "sm90", "split" or "portable".
#pragma once

#include <string>

#include "../../csrc/cuda/conv_fprop_sm80.cuh"
#include "../../csrc/cuda/conv_fprop_sm90.cuh"
#include "../../csrc/cuda/conv_split_sm90.cuh"

namespace fastres::cuda {

template <typename T, Epilogue kEpilogue>
void run_convolution(const std::string& kernel, const ConvShape& shape, const ConvFprop& f,
                     int tile_k, int multiprocessors) {
  const emulator::Queue queue;
  const bool portable = kernel == "portable", split = kernel == "split";
  const bool fits = portable ? fits_packs(shape) : fits_im2col(shape);
  if (!fits || (split && split_shares(shape, multiprocessors) == 0)) {
    throw std::runtime_error("does not fit");
  }
  if constexpr (kEpilogue == Epilogue::kApply) {
    if (split) return conv_split_sm90_run<T>(queue, shape, f, multiprocessors);
  }
  const auto run = [&](auto prologue) {
    if (portable)
      conv_fprop_sm80_run<T, kEpilogue, prologue>(queue, shape, f, tile_k);
    else
      conv_fprop_sm90_run<T, kEpilogue, prologue>(queue, shape, f, tile_k, multiprocessors);
  };
  if constexpr (kEpilogue == Epilogue::kMoments) {
    if (f.prologue.mean) return run(std::true_type());
  }
  run(std::false_type());
}

}  // namespace fastres::cuda
