// A classifier's head at small batches waits for its weight, which is read once, from memory: so
// that is read as it is, and multiplied in the accumulation type.
#include "lanes.h"
#include "mean_linear.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// Pixels that are summed up before they meet the sum of all: long sums of sums lose less.
constexpr int64_t kPixels = 8;

template <typename T>
void mean(const T* input, int64_t pixels, int64_t channels, acc_t<T>* mean) {
  using L = Lanes<T>;
  const L count(static_cast<acc_t<T>>(pixels));
  for (int64_t p = 0; p < pixels; p += kPixels) {
    const int64_t height = std::min(kPixels, pixels - p);
    for (int64_t c = 0; c < channels; c += L::kSize) {
      const int64_t lanes = std::min(L::kSize, channels - c);
      const T* const first = input + p * channels + c;
      L sum = L::load(first, lanes);
      for (int64_t i = 1; i < height; ++i) sum = sum + L::load(first + i * channels, lanes);
      if (p > 0) sum = sum + L::load_wide(mean + c);
      if (p + height == pixels) {
        sum = lanewise<T>([](const auto& x, const auto& y) { return x / y; }, sum, count);
      }
      sum.store_wide(mean + c);
    }
  }
}

// What a tile computes: outputs that share the loads of x, rows of x that share those of weights.
constexpr int64_t kOutputs = 4;
constexpr int64_t kRows = 2;

// Sums of kK outputs at kN rows. Meanwhile the weights behind these are fetched.
template <int kK, int kN, typename T>
FASTRES_INLINE void multiply(const LinearOperands<T>& in, int64_t row, int64_t output) {
  using L = Lanes<T>;
  const acc_t<T>* const x = in.x + row * in.stride;
  const T* const weight = in.weight + output * in.c;
  L sums[kK][kN];
#pragma GCC unroll 4
  for (int k = 0; k < kK; ++k) {
#pragma GCC unroll 2
    for (int n = 0; n < kN; ++n) sums[k][n] = L(acc_t<T>(0));
  }
  const auto add = [&](int64_t c, int64_t lanes) FASTRES_INLINED {
    L values[kN];
#pragma GCC unroll 2
    for (int n = 0; n < kN; ++n) values[n] = L::load_wide(x + n * in.stride + c);
#pragma GCC unroll 4
    for (int k = 0; k < kK; ++k) {
      const T* const at = weight + k * in.c + c;
      if (row == 0) __builtin_prefetch(at + kK * in.c, /*write=*/0, /*locality=*/2);
      const L w = L::load(at, lanes);
#pragma GCC unroll 2
      for (int n = 0; n < kN; ++n) sums[k][n] = fma(values[n], w, sums[k][n]);
    }
  };
  int64_t c = 0;
  for (; c + L::kSize <= in.c; c += L::kSize) add(c, L::kSize);
  if (c < in.c) add(c, in.c - c);
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < kN; ++n) {
      const acc_t<T> bias = in.bias == nullptr ? acc_t<T>(0) : acc_t<T>(in.bias[output + k]);
      in.output[(row + n) * in.k + output + k] = static_cast<T>(sums[k][n].sum() + bias);
    }
  }
}

template <int kK, typename T>
void multiply_rows(const LinearOperands<T>& in, int64_t output) {
  int64_t row = 0;
  for (; row + kRows <= in.n; row += kRows) multiply<kK, kRows>(in, row, output);
  if (row < in.n) multiply<kK, 1>(in, row, output);
}

template <typename T>
void linear(const LinearOperands<T>& operands, int64_t begin, int64_t end) {
  int64_t output = begin;
  for (; output + kOutputs <= end; output += kOutputs) multiply_rows<kOutputs>(operands, output);
  for (; output < end; ++output) multiply_rows<1>(operands, output);
}

}  // namespace

template <typename T>
MeanLinearKernels<T> mean_linear_kernels() {
  return {&mean<T>, &linear<T>};
}

template MeanLinearKernels<double> mean_linear_kernels<double>();
template MeanLinearKernels<float> mean_linear_kernels<float>();
template MeanLinearKernels<c10::BFloat16> mean_linear_kernels<c10::BFloat16>();
template MeanLinearKernels<c10::Half> mean_linear_kernels<c10::Half>();

}  // namespace fastres::cpu::CPU_CAPABILITY
