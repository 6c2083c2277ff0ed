#include "add_relu.cuh"

#include "add_relu.h"
#include "queue.cuh"

namespace fastres::cuda {

template <typename T>
void launch_add_relu(cudaStream_t stream, const T* a, const T* b, T* out, int64_t n,
                     Combination f) {
  const Queue queue("add_relu", stream);
  if (f == Combination::kAddRelu)
    combine(queue, a, b, out, n, AddRelu{});
  else
    combine(queue, a, b, out, n, ReluMask{});
}

template void launch_add_relu(cudaStream_t, const double*, const double*, double*, int64_t,
                              Combination);
template void launch_add_relu(cudaStream_t, const float*, const float*, float*, int64_t,
                              Combination);
template void launch_add_relu(cudaStream_t, const __half*, const __half*, __half*, int64_t,
                              Combination);
template void launch_add_relu(cudaStream_t, const __nv_bfloat16*, const __nv_bfloat16*,
                              __nv_bfloat16*, int64_t, Combination);

}  // namespace fastres::cuda
