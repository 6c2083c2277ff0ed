#include "bn_relu_lanes.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// The gradient that ReLU let pass at element i; `centred` is x - mean there.
template <typename T, Mask kMask>
inline Lanes<T> masked_gradient(const BackwardArrays<T>& a, int64_t i, int64_t count,
                                const Lanes<T>& centred, const Lanes<T>& scale,
                                const Lanes<T>& shift) {
  const auto g = Lanes<T>::load(a.grad_output + i, count);
  if constexpr (kMask == Mask::kFromInput) {
    return relu_mask(g, normalise(centred, scale, shift), kRoundsToZero<T>);
  } else if constexpr (kMask == Mask::kFromOutput) {
    return relu_mask(g, Lanes<T>::load(a.output + i, count), 0);
  } else {
    return g;
  }
}

template <typename T, Mask kMask, bool kResidual, int kBlock>
inline void chunk_reduce(const BackwardArrays<T>& a, const Runs& rows, const Coefficients<T>& k,
                         int64_t channel, double* sum_g, double* sum_gx) {
  using L = Lanes<T>;
  constexpr int64_t kWidth = kBlock * L::kSize;
  const int64_t last = rows.size - (kBlock - 1) * L::kSize;
  L total_g[kBlock], total_gx[kBlock], mean[kBlock], scale[kBlock], shift[kBlock];
  for (int b = 0; b < kBlock; ++b) {
    const int64_t c = channel + b * L::kSize;
    total_g[b] = total_gx[b] = L(0);
    mean[b] = L::load_wide(k.mean + c);
    scale[b] = L::load_wide(k.scale + c);
    shift[b] = L::load_wide(k.shift + c);
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    for (int b = 0; b < kBlock; ++b) {
      const int64_t i = r * rows.stride + b * L::kSize;
      const int64_t count = b + 1 < kBlock ? L::kSize : last;
      const L centred = L::load(a.input + i, count) - mean[b];
      const L g = masked_gradient<T, kMask>(a, i, count, centred, scale[b], shift[b]);
      if constexpr (kResidual) store(g, rows, a.grad_residual + i, count);
      total_g[b] = total_g[b] + g;
      total_gx[b] = fma(g, centred, total_gx[b]);
    }
  }
  alignas(64) acc_t<T> wide[2][kWidth];
  for (int b = 0; b < kBlock; ++b) {
    total_g[b].store_wide(wide[0] + b * L::kSize);
    total_gx[b].store_wide(wide[1] + b * L::kSize);
  }
  for (int64_t j = 0; j < rows.size; ++j) {
    sum_g[j] += wide[0][j];
    sum_gx[j] += wide[1][j];
  }
}

template <typename T, Mask kMask, bool kResidual>
void row_reduce_as(const BackwardArrays<T>& a, const Runs& rows, const Coefficients<T>& k,
                   double* sum_g, double* sum_gx) {
  constexpr int64_t kSize = Lanes<T>::kSize, kWidth = kColumnBlock<T> * kSize;
  const int64_t step = rows_per_chunk(rows.size);
  for (int64_t r = 0; r < rows.count; r += step) {
    const int64_t count = std::min(step, rows.count - r);
    const int64_t base = r * rows.stride;
    int64_t j = 0;
    for (; j + kWidth <= rows.size; j += kWidth) {
      chunk_reduce<T, kMask, kResidual, kColumnBlock<T>>(
          a.at(base + j), {count, kWidth, rows.stride, rows.stream}, k, j, sum_g + j, sum_gx + j);
    }
    for (; j < rows.size; j += kSize) {
      chunk_reduce<T, kMask, kResidual, 1>(
          a.at(base + j), {count, std::min(kSize, rows.size - j), rows.stride, rows.stream}, k, j,
          sum_g + j, sum_gx + j);
    }
  }
}

template <typename T, Mask kMask, bool kResidual>
void plane_reduce_as(const BackwardArrays<T>& a, const Runs& planes, const Coefficients<T>& k,
                     double* sum_g, double* sum_gx) {
  using L = Lanes<T>;
  const L mean(*k.mean), scale(*k.scale), shift(*k.shift);
  for_each_plane_chunk(planes, [&](const Runs& chunk, int64_t first) {
    L total_g(0), total_gx(0);
    for_each_lanes<T>(chunk, [&](int64_t i, int64_t, int64_t count) {
      const L centred = L::load(a.input + first + i, count) - mean;
      L g = masked_gradient<T, kMask>(a, first + i, count, centred, scale, shift);
      if constexpr (kResidual) store(g, chunk, a.grad_residual + first + i, count);
      if (count < L::kSize) g = g.keep(count);
      total_g = total_g + g;
      total_gx = fma(g, centred, total_gx);
    });
    *sum_g += total_g.sum();
    *sum_gx += total_gx.sum();
  });
}

template <typename T, bool kPlane, Mask kMask, bool kResidual, bool kTraining>
void apply_as(const BackwardArrays<T>& a, const Runs& runs, const Coefficients<T>& k) {
  using L = Lanes<T>;
  constexpr bool kNeedsInput = kTraining || kMask == Mask::kFromInput;
  const Coefficient<T, kPlane> mean(k.mean), scale(k.scale), shift(k.shift), slope(k.slope),
      offset(k.offset);
  for_each_lanes<T>(runs, [&](int64_t i, int64_t c, int64_t count) {
    L centred(0);
    if constexpr (kNeedsInput) centred = L::load(a.input + i, count) - mean.at(c);
    const L g = masked_gradient<T, kMask>(a, i, count, centred, scale.at(c), shift.at(c));
    if constexpr (kResidual) store(g, runs, a.grad_residual + i, count);
    if (a.grad_input == nullptr) return;
    if constexpr (kTraining) {
      store(fma(scale.at(c), g, fma(slope.at(c), centred, offset.at(c))), runs, a.grad_input + i,
            count);
    } else {
      store(scale.at(c) * g, runs, a.grad_input + i, count);
    }
  });
}

// Turns the run-time choices into a compile-time one: f is called with Mask and bool constants.
template <typename F>
void choose(Mask mask, bool residual, const F& f) {
  using None = std::integral_constant<Mask, Mask::kNone>;
  using Input = std::integral_constant<Mask, Mask::kFromInput>;
  using Output = std::integral_constant<Mask, Mask::kFromOutput>;
  switch (mask) {
    case Mask::kNone:
      return residual ? f(None{}, std::true_type{}) : f(None{}, std::false_type{});
    case Mask::kFromInput:
      return residual ? f(Input{}, std::true_type{}) : f(Input{}, std::false_type{});
    case Mask::kFromOutput:
      return residual ? f(Output{}, std::true_type{}) : f(Output{}, std::false_type{});
  }
}

template <typename T, bool kPlane>
void reduce(const BackwardArrays<T>& a, Runs runs, const Coefficients<T>& k, Mask mask,
            double* sum_g, double* sum_gx) {
  choose(mask, a.grad_residual != nullptr, [&](auto m, auto residual) {
    if constexpr (kPlane) {
      plane_reduce_as<T, m.value, residual.value>(a, runs, k, sum_g, sum_gx);
    } else {
      row_reduce_as<T, m.value, residual.value>(a, runs, k, sum_g, sum_gx);
    }
  });
  fence(runs);
}

template <typename T, bool kPlane>
void apply(const BackwardArrays<T>& a, Runs runs, const Coefficients<T>& k, Mask mask) {
  choose(mask, a.grad_residual != nullptr, [&](auto m, auto residual) {
    k.slope != nullptr ? apply_as<T, kPlane, m.value, residual.value, true>(a, runs, k)
                       : apply_as<T, kPlane, m.value, residual.value, false>(a, runs, k);
  });
  fence(runs);
}

}  // namespace

template <typename T>
BnReluBackwardKernels<T> bn_relu_backward_kernels() {
  return {&reduce<T, false>, &reduce<T, true>, &apply<T, false>, &apply<T, true>};
}

template BnReluBackwardKernels<double> bn_relu_backward_kernels<double>();
template BnReluBackwardKernels<float> bn_relu_backward_kernels<float>();
template BnReluBackwardKernels<c10::BFloat16> bn_relu_backward_kernels<c10::BFloat16>();
template BnReluBackwardKernels<c10::Half> bn_relu_backward_kernels<c10::Half>();

}  // namespace fastres::cpu::CPU_CAPABILITY
