#include "conv_fprop_sm80.cuh"

#include "kernel_entry.h"
#include "queue.cuh"

namespace fastres::cuda {

void launch_conv_portable(cudaStream_t stream, bool bfloat16, Epilogue epilogue,
                          const ConvShape& shape, const ConvFprop& f, int tile_k) {
  const Queue queue("conv_fprop", stream);
  const auto run = [&](auto type) {
    using T = decltype(type);
    if (f.prologue.mean) {  // kMoments
      return conv_fprop_sm80_run<T, Epilogue::kMoments, true>(queue, shape, f, tile_k);
    }
    with_epilogue(epilogue,
                  [&](auto kind) { conv_fprop_sm80_run<T, kind>(queue, shape, f, tile_k); });
  };
  if (bfloat16)
    run(__nv_bfloat16());
  else
    run(__half());
}

std::vector<KernelEntry> conv_portable_entries() {
  const auto entry = [](const char* form, auto* kernel, size_t bytes) {
    return KernelEntry{"conv_fprop_sm80", form, reinterpret_cast<const void*>(kernel),
                       kPortableThreads, bytes};
  };
  using T = __nv_bfloat16;
  constexpr auto kApply = Epilogue::kApply, kMoments = Epilogue::kMoments, kMask = Epilogue::kMask;
  constexpr size_t kBytes = sizeof(PortableMemory<128>);
  return {
      entry("bfloat16 64 filters", conv_fprop_sm80<T, 64, kApply, false>,
            sizeof(PortableMemory<64>)),
      entry("bfloat16 128 filters", conv_fprop_sm80<T, 128, kApply, false>, kBytes),
      entry("bfloat16 128 filters moments", conv_fprop_sm80<T, 128, kMoments, false>, kBytes),
      entry("bfloat16 128 filters mask", conv_fprop_sm80<T, 128, kMask, false>, kBytes),
      entry("bfloat16 128 filters prologue", conv_fprop_sm80<T, 128, kMoments, true>, kBytes),
  };
}

}  // namespace fastres::cuda
