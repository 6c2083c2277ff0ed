#include "bn_relu_backward.cuh"

#include "queue.cuh"

namespace fastres::cuda {

template <typename T>
void launch_bn_relu_backward(cudaStream_t stream, const Activation& a, const BnReluBackward<T>& b,
                             int multiprocessors) {
  bn_relu_backward_run(Queue("bn_relu_backward", stream), a, b, multiprocessors);
}

template void launch_bn_relu_backward(cudaStream_t, const Activation&,
                                      const BnReluBackward<double>&, int);
template void launch_bn_relu_backward(cudaStream_t, const Activation&, const BnReluBackward<float>&,
                                      int);
template void launch_bn_relu_backward(cudaStream_t, const Activation&,
                                      const BnReluBackward<__half>&, int);
template void launch_bn_relu_backward(cudaStream_t, const Activation&,
                                      const BnReluBackward<__nv_bfloat16>&, int);

}  // namespace fastres::cuda
