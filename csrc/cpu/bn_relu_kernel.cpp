#include "bn_relu_lanes.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// Adds a chunk of n values, known by a rough mean and the sums of (x - mean) and (x - mean)^2.
// The first of these sums makes good what rounding cost the mean: 1e4 +- 1 loses nothing. It is no
// number where the mean is infinite, and then there is nothing to make good.
inline void merge_chunk(double n, double mean, double deviation, double squares,
                        const MomentsMerge& merge, double& sum, double& m2) {
  const double correction = deviation == deviation ? deviation : 0.0;
  const double chunk_sum = n * mean + correction;
  const double delta = chunk_sum * merge.inverse_b - sum * merge.inverse_a;
  m2 += squares - deviation * deviation * merge.inverse_b + delta * delta * merge.weight;
  sum += chunk_sum;
}

// One chunk of rows, kBlock registers wide: mean first, then deviations while the rows are cached.
template <typename T, int kBlock>
inline void chunk_moments(const T* x, int64_t rows, int64_t stride, int64_t width,
                          const MomentsMerge& merge, double* sum, double* m2) {
  using L = Lanes<T>;
  constexpr int64_t kWidth = kBlock * L::kSize;
  const int64_t last = width - (kBlock - 1) * L::kSize;  // lanes of the last register in use
  const auto load = [&](int64_t r, int b) {
    const T* p = x + r * stride + b * L::kSize;
    return b + 1 < kBlock ? L::load(p) : L::load(p, last);
  };
  L total[kBlock], deviation[kBlock], squares[kBlock];
  for (int b = 0; b < kBlock; ++b) total[b] = deviation[b] = squares[b] = L(0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int b = 0; b < kBlock; ++b) total[b] = total[b] + load(r, b);
  }
  const L inverse(static_cast<acc_t<T>>(merge.inverse_b));
  for (int b = 0; b < kBlock; ++b) total[b] = total[b] * inverse;
  for (int64_t r = 0; r < rows; ++r) {
    for (int b = 0; b < kBlock; ++b) {
      const L d = load(r, b) - total[b];
      deviation[b] = deviation[b] + d;
      squares[b] = fma(d, d, squares[b]);
    }
  }
  alignas(64) acc_t<T> wide[3][kWidth];
  for (int b = 0; b < kBlock; ++b) {
    total[b].store_wide(wide[0] + b * L::kSize);
    deviation[b].store_wide(wide[1] + b * L::kSize);
    squares[b].store_wide(wide[2] + b * L::kSize);
  }
  for (int64_t j = 0; j < width; ++j) {
    merge_chunk(static_cast<double>(rows), wide[0][j], wide[1][j], wide[2][j], merge, sum[j],
                m2[j]);
  }
}

template <typename T>
void row_moments(const T* x, Runs rows, double* sum, double* m2) {
  constexpr int64_t kSize = Lanes<T>::kSize, kWidth = kColumnBlock<T> * kSize;
  const int64_t step = rows_per_chunk(rows.size);
  std::fill_n(sum, rows.size, 0.0);
  std::fill_n(m2, rows.size, 0.0);
  for (int64_t r = 0; r < rows.count; r += step) {
    const int64_t count = std::min(step, rows.count - r);
    const MomentsMerge merge(r, count);
    const T* p = x + r * rows.stride;
    int64_t j = 0;
    for (; j + kWidth <= rows.size; j += kWidth) {
      chunk_moments<T, kColumnBlock<T>>(p + j, count, rows.stride, kWidth, merge, sum + j, m2 + j);
    }
    for (; j < rows.size; j += kSize) {
      chunk_moments<T, 1>(p + j, count, rows.stride, std::min(kSize, rows.size - j), merge, sum + j,
                          m2 + j);
    }
  }
}

template <typename T>
void plane_moments(const T* x, Runs planes, double* sum, double* m2) {
  using L = Lanes<T>;
  *sum = *m2 = 0;
  int64_t seen = 0;
  for_each_plane_chunk(planes, [&](const Runs& chunk, int64_t first) {
    const int64_t n = chunk.count * chunk.size;
    L total(0), deviation(0), squares(0);
    for_each_lanes<T>(chunk, [&](int64_t i, int64_t, int64_t count) FASTRES_INLINED {
      total = total + L::load(x + first + i, count);
    });
    const acc_t<T> mean = total.sum() / static_cast<acc_t<T>>(n);
    const L centre(mean);
    for_each_lanes<T>(chunk, [&](int64_t i, int64_t, int64_t count) FASTRES_INLINED {
      L d = L::load(x + first + i, count) - centre;
      if (count < L::kSize) d = d.keep(count);
      deviation = deviation + d;
      squares = fma(d, d, squares);
    });
    merge_chunk(static_cast<double>(n), mean, deviation.sum(), squares.sum(), MomentsMerge(seen, n),
                *sum, *m2);
    seen += n;
  });
}

template <typename T, bool kPlane, bool kResidual, bool kRelu>
void apply_as(const T* x, const T* residual, T* y, const Runs& runs, const Coefficients<T>& k) {
  using L = Lanes<T>;
  const Coefficient<T, kPlane> mean(k.mean), scale(k.scale), shift(k.shift);
  for_each_lanes<T>(runs, [&](int64_t i, int64_t c, int64_t count) FASTRES_INLINED {
    L out = normalise(L::load(x + i, count) - mean.at(c), scale.at(c), shift.at(c));
    if constexpr (kResidual) out = out + L::load(residual + i, count);
    if constexpr (kRelu) out = relu(out);
    store(out, runs, y + i, count);
  });
}

template <typename T, bool kPlane>
void apply(const T* x, const T* residual, T* y, Runs runs, const Coefficients<T>& k, bool relu) {
  if (residual != nullptr) {
    relu ? apply_as<T, kPlane, true, true>(x, residual, y, runs, k)
         : apply_as<T, kPlane, true, false>(x, residual, y, runs, k);
  } else {
    relu ? apply_as<T, kPlane, false, true>(x, residual, y, runs, k)
         : apply_as<T, kPlane, false, false>(x, residual, y, runs, k);
  }
  fence(runs);
}

}  // namespace

template <typename T>
BnReluKernels<T> bn_relu_kernels() {
  return {&row_moments<T>, &plane_moments<T>, &apply<T, false>, &apply<T, true>};
}

template BnReluKernels<double> bn_relu_kernels<double>();
template BnReluKernels<float> bn_relu_kernels<float>();
template BnReluKernels<c10::BFloat16> bn_relu_kernels<c10::BFloat16>();
template BnReluKernels<c10::Half> bn_relu_kernels<c10::Half>();

}  // namespace fastres::cpu::CPU_CAPABILITY
