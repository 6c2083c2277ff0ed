#include "conv_wgrad_sm90.cuh"
#include "kernel_entry.h"
#include "queue.cuh"

namespace fastres::cuda {

void launch_conv_wgrad(cudaStream_t stream, bool bfloat16, const ConvShape& shape,
                       const ConvWgrad& w, int multiprocessors) {
  const Queue queue("conv_wgrad", stream);
  if (bfloat16)
    conv_wgrad_sm90_run<__nv_bfloat16>(queue, shape, w, multiprocessors);
  else
    conv_wgrad_sm90_run<__half>(queue, shape, w, multiprocessors);
}

std::vector<KernelEntry> conv_wgrad_entries() {
#if defined(FASTRES_SM90)
  const auto entry = [](const char* form, auto* kernel, size_t bytes) {
    return KernelEntry{"conv_wgrad_sm90", form, reinterpret_cast<const void*>(kernel), kConvThreads,
                       bytes};
  };
  using T = __nv_bfloat16;
  return {
      entry("bfloat16 64 filters", conv_wgrad_sm90<T, 64, false>, sizeof(WgradMemory<64>)),
      entry("bfloat16 128 filters", conv_wgrad_sm90<T, 128, false>, sizeof(WgradMemory<128>)),
      entry("bfloat16 256 filters", conv_wgrad_sm90<T, 256, false>, sizeof(WgradMemory<256>)),
      entry("bfloat16 256 filters prologue", conv_wgrad_sm90<T, 256, true>,
            sizeof(WgradMemory<256>)),
  };
#else
  return {};
#endif
}

}  // namespace fastres::cuda
