#include "conv_fprop_sm90.cuh"
#include "conv_split_sm90.cuh"
#include "kernel_entry.h"
#include "queue.cuh"

namespace fastres::cuda {

bool has_conv_fprop() {
#if defined(FASTRES_SM90)
  return true;
#else
  return false;
#endif
}

void launch_conv_fprop(cudaStream_t stream, bool bfloat16, Epilogue epilogue,
                       const ConvShape& shape, const ConvFprop& f, int tile_k,
                       int multiprocessors) {
  const Queue queue("conv_fprop", stream);
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (epilogue == Epilogue::kApply && split_shares(shape, multiprocessors) > 0) {
      return conv_split_sm90_run<T>(queue, shape, f, multiprocessors);
    }
    if (f.prologue.mean) {  // kMoments
      return conv_fprop_sm90_run<T, Epilogue::kMoments, true>(queue, shape, f, tile_k,
                                                              multiprocessors);
    }
    with_epilogue(epilogue, [&](auto kind) {
      conv_fprop_sm90_run<T, kind>(queue, shape, f, tile_k, multiprocessors);
    });
  };
  if (bfloat16)
    run(__nv_bfloat16());
  else
    run(__half());
}

std::vector<KernelEntry> conv_entries() {
  if (!has_conv_fprop()) return {};
  const auto entry = [](const char* form, auto* kernel, size_t bytes) {
    return KernelEntry{"conv_fprop_sm90", form, reinterpret_cast<const void*>(kernel), kConvThreads,
                       bytes};
  };
  const auto split = [](const char* form, auto* kernel) {
    return KernelEntry{"conv_split_sm90", form, reinterpret_cast<const void*>(kernel),
                       kSplitThreads, sizeof(SplitMemory)};
  };
  using T = __nv_bfloat16;
  constexpr auto kApply = Epilogue::kApply, kMoments = Epilogue::kMoments, kMask = Epilogue::kMask;
  return {
      entry("bfloat16 64 filters", conv_fprop_sm90<T, 64, kApply, false>, sizeof(ConvMemory<64>)),
      entry("bfloat16 128 filters", conv_fprop_sm90<T, 128, kApply, false>,
            sizeof(ConvMemory<128>)),
      entry("bfloat16 256 filters", conv_fprop_sm90<T, 256, kApply, false>,
            sizeof(ConvMemory<256>)),
      entry("bfloat16 256 filters moments", conv_fprop_sm90<T, 256, kMoments, false>,
            sizeof(ConvMemory<256>)),
      entry("bfloat16 128 filters mask", conv_fprop_sm90<T, 128, kMask, false>,
            sizeof(ConvMemory<128>)),
      entry("bfloat16 128 filters prologue", conv_fprop_sm90<T, 128, kMoments, true>,
            sizeof(ConvMemory<128>) + norm_bytes(kMostNormalised)),
      split("bfloat16", conv_split_sm90<T>),
  };
}

}  // namespace fastres::cuda
