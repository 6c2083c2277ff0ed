#include "bn_relu_lanes.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// The gradient that ReLU let pass at element i; `centred` is x - mean there.
template <typename T, Mask kMask>
FASTRES_INLINE Lanes<T> masked_gradient(const BackwardArrays<T>& a, int64_t i, int64_t count,
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

// kRows neighbouring rows at once, whole rows at a time: memory is read in its own order, for a
// walk down one column block touches a new page at every row.
template <typename T, Mask kMask, bool kResidual, int kRows>
FASTRES_INLINE void rows_reduce(const BackwardArrays<T>& a, const Runs& rows,
                                const Coefficients<T>& k, acc_t<T>* sum_g, acc_t<T>* sum_gx) {
  using L = Lanes<T>;
  const auto reduce = [&](int64_t j, int64_t count) FASTRES_INLINED {
    const L mean = L::load_wide(k.mean + j), scale = L::load_wide(k.scale + j),
            shift = L::load_wide(k.shift + j);
    L total_g = L::load_wide(sum_g + j), total_gx = L::load_wide(sum_gx + j);
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = r * rows.stride + j;
      const L centred = L::load(a.input + i, count) - mean;
      const L g = masked_gradient<T, kMask>(a, i, count, centred, scale, shift);
      if constexpr (kResidual) store(g, rows, a.grad_residual + i, count);
      total_g = total_g + g;
      total_gx = fma(g, centred, total_gx);
    }
    total_g.store_wide(sum_g + j);
    total_gx.store_wide(sum_gx + j);
  };
  int64_t j = 0;
  for (; j + L::kSize <= rows.size; j += L::kSize) reduce(j, L::kSize);
  if (j < rows.size) reduce(j, rows.size - j);
}

template <typename T, Mask kMask, bool kResidual>
void row_reduce_as(const BackwardArrays<T>& a, const Runs& rows, const Coefficients<T>& k,
                   double* sum_g, double* sum_gx) {
  constexpr int kTogether = 4;
  alignas(64) acc_t<T> wide[2][kRowBlock + kChannelPadding];
  const int64_t step = rows_per_chunk(rows.size);
  for (int64_t begin = 0; begin < rows.count; begin += step) {
    const int64_t end = std::min(begin + step, rows.count);
    for (auto& totals : wide) std::fill_n(totals, rows.size + kChannelPadding, 0);
    int64_t r = begin;
    for (; r + kTogether <= end; r += kTogether) {
      rows_reduce<T, kMask, kResidual, kTogether>(a.at(r * rows.stride), rows, k, wide[0], wide[1]);
    }
    for (; r < end; ++r) {
      rows_reduce<T, kMask, kResidual, 1>(a.at(r * rows.stride), rows, k, wide[0], wide[1]);
    }
    for (int64_t j = 0; j < rows.size; ++j) {
      sum_g[j] += wide[0][j];
      sum_gx[j] += wide[1][j];
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
    for_each_lanes<T>(chunk, [&](int64_t i, int64_t, int64_t count) FASTRES_INLINED {
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
  for_each_lanes<T>(runs, [&](int64_t i, int64_t c, int64_t count) FASTRES_INLINED {
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
