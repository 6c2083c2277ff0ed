// Kernels of bn_relu and bn_relu_backward.
//
// Activations come in one of two shapes. Rows (channels_last): `count` runs of `size` neighbouring
// channels. Planes (contiguous): `count` runs of `size` pixels of one channel. Successive runs
// start `stride` elements apart.
#pragma once

#include "activations.h"
#include "capability.h"

namespace fastres::cpu {

// Channels that a kernel which reduces rows is given at most.
constexpr int64_t kRowBlock = 256;

struct Runs {
  int64_t count, size, stride;
  bool stream = false;  // write around the cache; every full vector written is aligned
};

// y = (x - mean) * scale + shift and, in backward, dx = scale * g + slope * (x - mean) + offset.
// Rows: padded vectors of a value per channel; planes: one value each.
template <typename T>
struct Coefficients {
  const acc_t<T>*mean, *scale, *shift, *slope, *offset;
};

// Where backward learns which gradients ReLU blocked.
enum class Mask { kNone, kFromInput, kFromOutput };

// Arrays of one layout. `grad_residual` and `grad_input` are written where they are not null.
template <typename T>
struct BackwardArrays {
  const T *grad_output, *input, *output;
  T *grad_residual, *grad_input;

  // The same arrays from another element on.
  BackwardArrays at(int64_t i) const {
    return {grad_output + i, input ? input + i : nullptr, output ? output + i : nullptr,
            grad_residual ? grad_residual + i : nullptr, grad_input ? grad_input + i : nullptr};
  }
};

template <typename T>
struct BnReluKernels {
  // Per channel: the sum, and the sum of squared deviations from the mean. Rows: `size` of each.
  void (*row_moments)(const T* x, Runs rows, double* sum, double* m2);
  void (*plane_moments)(const T* x, Runs planes, double* sum, double* m2);
  // y = act((x - mean) * scale + shift (+ residual)); residual may be null.
  void (*row_apply)(const T* x, const T* residual, T* y, Runs rows, const Coefficients<T>& k,
                    bool relu);
  void (*plane_apply)(const T* x, const T* residual, T* y, Runs planes, const Coefficients<T>& k,
                      bool relu);
};

template <typename T>
struct BnReluBackwardKernels {
  // Adds per channel the sums of g and of g * (x - mean), g being the masked gradient.
  void (*row_reduce)(const BackwardArrays<T>& a, Runs rows, const Coefficients<T>& k, Mask mask,
                     double* sum_g, double* sum_gx);
  void (*plane_reduce)(const BackwardArrays<T>& a, Runs planes, const Coefficients<T>& k, Mask mask,
                       double* sum_g, double* sum_gx);
  // Writes grad_input (and grad_residual). Null slope: frozen statistics, grad_input = scale * g.
  void (*row_apply)(const BackwardArrays<T>& a, Runs rows, const Coefficients<T>& k, Mask mask);
  void (*plane_apply)(const BackwardArrays<T>& a, Runs planes, const Coefficients<T>& k, Mask mask);
};

FASTRES_DECLARE_KERNELS(BnReluKernels, bn_relu_kernels)
FASTRES_DECLARE_KERNELS(BnReluBackwardKernels, bn_relu_backward_kernels)

// Merges the moments of n_b values into those of n_a (Chan, Golub, LeVeque 1979). Kept as a sum
// rather than a mean so that an infinity stays one.
struct MomentsMerge {
  double inverse_a, inverse_b, weight;

  MomentsMerge(int64_t n_a, int64_t n_b)
      : inverse_a(0), inverse_b(1.0 / static_cast<double>(n_b)), weight(0) {
    if (n_a == 0) return;
    const auto a = static_cast<double>(n_a), b = static_cast<double>(n_b);
    inverse_a = 1.0 / a;
    weight = a * b / (a + b);
  }
};

}  // namespace fastres::cpu
