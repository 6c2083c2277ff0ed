// What bn_relu's kernels are given, and how they are launched: free of torch and of device code.
#pragma once

#include "bn_relu_plan.h"

namespace fastres::cuda {

// Per channel, in the type of accumulators; weight (1) and bias (0) may be null.
template <typename A>
struct Vectors {
  const A *mean, *invstd, *weight, *bias;
};

// Of the values of a channel in a segment: how many, a pivot, and the sums of x - pivot and of the
// squared deviations from their mean. The mean, pivot + sum / count, would lose an infinity.
template <typename A>
struct Moments {
  A count, pivot, sum, squares;
};

// Where the statistics of a batch go; the running ones may be null.
template <typename A>
struct Statistics {
  A *mean, *invstd, *running_mean, *running_var;
  double momentum, eps;
};

// The arrays of one call, all on one device. Activations are dense; `moments` has room for
// bn_relu_moments_size() elements, the running statistics are written only when training. A null
// output: nothing but statistics; null statistics: those of `vectors` are there already.
template <typename T>
struct BnRelu {
  const T *input, *residual;
  T* output;
  Vectors<acc_t<T>> vectors;  // mean and invstd: those of `statistics`, if any
  Statistics<acc_t<T>> statistics;
  Moments<acc_t<T>>* moments;
  int64_t segments;  // of moments that are there already, else 0
  bool training, relu;
};

// f(N, kSideBySide) as constants: a pack of 16 bytes where every run is a whole number of them and
// they are aligned, else single values.
template <typename T, typename F>
void with_form(const Activation& a, bool is_aligned, F f) {
  constexpr int kWide = kPackBytes / sizeof(T);
  const bool wide = is_aligned && a.run() % kWide == 0;
  const auto with_pack = [&](auto pack) {
    if (a.side_by_side)
      f(pack, std::true_type());
    else
      f(pack, std::false_type());
  };
  if (wide)
    with_pack(std::integral_constant<int, kWide>());
  else
    with_pack(std::integral_constant<int, 1>());
}

template <typename T>
bool all_aligned(const BnRelu<T>& b) {
  return aligned(b.input) && aligned(b.residual) && aligned(b.output);
}

template <typename T>
int64_t bn_relu_moments_size(const Activation& a, bool is_aligned, int multiprocessors) {
  int64_t size = 0;
  with_form<T>(a, is_aligned, [&](auto pack, auto) {
    size = cut_to_reduce(a, pack, multiprocessors).segments * a.channels;
  });
  return size;
}

// Where backward learns which gradients ReLU blocked: computed anew, by forward's operations, or
// from what forward wrote.
enum class Mask { kNone, kFromInput, kFromOutput };

// Activations of one call; `output` is read only where the mask comes from it, grad_input and
// grad_residual are written where they are not null.
template <typename T>
struct Gradients {
  const T *grad_output, *input, *output;
  T *grad_input, *grad_residual;
};

// Of a segment: the sums of g and of g * (x - mean), g being the masked gradient.
template <typename A>
struct Sums {
  A g, gx;
};

// What the second pass needs of a channel: dx = scale * (g - offset - (x - mean) * slope).
template <typename A>
struct Slopes {
  A slope, offset;
};

// The arrays of one call, all on one device; those that are not wanted are null. `sums` has room
// for bn_relu_moments_size() elements, `slopes` for one a channel.
template <typename T>
struct BnReluBackward {
  Gradients<T> activations;
  Vectors<acc_t<T>> vectors;
  acc_t<T>*grad_weight, *grad_bias;
  Sums<acc_t<T>>* sums;
  int64_t segments;  // of sums that are there already, with no gradient of the residual; else 0
  Slopes<acc_t<T>>* slopes;
  Mask mask;
  bool training;
};

template <typename T>
bool all_aligned(const Gradients<T>& p) {
  return aligned(p.grad_output) && aligned(p.input) && aligned(p.output) && aligned(p.grad_input) &&
         aligned(p.grad_residual);
}

// In bn_relu.cu and bn_relu_backward.cu, for double, float, __half and __nv_bfloat16.
template <typename T>
void launch_bn_relu(cudaStream_t stream, const Activation& a, const BnRelu<T>& b,
                    int multiprocessors);
template <typename T>
void launch_bn_relu_backward(cudaStream_t stream, const Activation& a, const BnReluBackward<T>& b,
                             int multiprocessors);

}  // namespace fastres::cuda
