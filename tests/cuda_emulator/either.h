// One convolution by either of csrc/cuda's kernels.
#pragma once

#include "../../csrc/cuda/conv_fprop_sm80.cuh"
#include "../../csrc/cuda/conv_fprop_sm90.cuh"

namespace fastres::cuda {

template <typename T, Epilogue kEpilogue>
void run_either(bool portable, const ConvShape& shape, const ConvFprop& f, int tile_k,
                int multiprocessors) {
  const emulator::Queue queue;
  if (portable ? !fits_packs(shape) : !fits_im2col(shape)) throw std::runtime_error("does not fit");
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
