#include "conv_wgrad_sm90.cuh"
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

}  // namespace fastres::cuda
