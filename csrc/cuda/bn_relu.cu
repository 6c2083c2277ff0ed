#include "bn_relu.cuh"

#include "kernel_entry.h"
#include "queue.cuh"

namespace fastres::cuda {

template <typename T>
void launch_bn_relu(cudaStream_t stream, const Activation& a, const BnRelu<T>& b,
                    int multiprocessors) {
  bn_relu_run(Queue("bn_relu", stream), a, b, multiprocessors);
}

template void launch_bn_relu(cudaStream_t, const Activation&, const BnRelu<double>&, int);
template void launch_bn_relu(cudaStream_t, const Activation&, const BnRelu<float>&, int);
template void launch_bn_relu(cudaStream_t, const Activation&, const BnRelu<__half>&, int);
template void launch_bn_relu(cudaStream_t, const Activation&, const BnRelu<__nv_bfloat16>&, int);

std::vector<KernelEntry> bn_relu_entries() {
  const auto entry = [](const char* name, const char* form, auto* kernel) {
    return KernelEntry{name, form, reinterpret_cast<const void*>(kernel), kThreads, 0};
  };
  using T = __nv_bfloat16;
  return {entry("bn_relu_moments", "bfloat16 channels_last", bn_relu_moments<T, 8, true>),
          entry("bn_relu_moments", "bfloat16 contiguous", bn_relu_moments<T, 8, false>),
          entry("bn_relu_apply", "bfloat16 channels_last", bn_relu_apply<T, 8, true>),
          entry("bn_relu_apply", "bfloat16 contiguous", bn_relu_apply<T, 8, false>),
          entry("bn_relu_apply", "float32 channels_last", bn_relu_apply<float, 4, true>)};
}

}  // namespace fastres::cuda
