#include "add_relu.h"
#include "lanes.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// Calls f(offset, count) for whole vectors, then once for what is left.
template <typename T, typename F>
inline void for_each_vector(int64_t n, const F& f) {
  constexpr int64_t kSize = Lanes<T>::kSize;
  int64_t i = 0;
  for (; i + kSize <= n; i += kSize) f(i, kSize);
  if (i < n) f(i, n - i);
}

template <typename T>
void forward(const T* input, const T* residual, T* output, int64_t n) {
  for_each_vector<T>(n, [&](int64_t i, int64_t count) {
    relu(Lanes<T>::load(input + i, count) + Lanes<T>::load(residual + i, count))
        .store(output + i, count);
  });
}

template <typename T>
void backward(const T* grad_output, const T* output, T* grad, int64_t n) {
  for_each_vector<T>(n, [&](int64_t i, int64_t count) {
    const auto g = Lanes<T>::load(grad_output + i, count);
    relu_mask(g, Lanes<T>::load(output + i, count), 0).store(grad + i, count);
  });
}

}  // namespace

template <typename T>
AddReluKernels<T> add_relu_kernels() {
  return {&forward<T>, &backward<T>};
}

template AddReluKernels<double> add_relu_kernels<double>();
template AddReluKernels<float> add_relu_kernels<float>();
template AddReluKernels<c10::BFloat16> add_relu_kernels<c10::BFloat16>();
template AddReluKernels<c10::Half> add_relu_kernels<c10::Half>();

}  // namespace fastres::cpu::CPU_CAPABILITY
