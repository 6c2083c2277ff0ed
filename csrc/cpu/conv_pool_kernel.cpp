#include "conv_pool.h"
#include "conv_tile.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// The maxima of `rows` x `columns` pixels behind a ReLU, channel by channel. NaN wins, as in
// PyTorch: the sum of values that are not negative is NaN if one of them is, and an instruction's
// maximum is then either of the two.
template <typename T>
FASTRES_INLINE void pool_window(const T* input, int64_t stride, int64_t rows, int64_t columns,
                                int64_t channels, T* output) {
  for (int64_t c = 0; c < channels; c += kVec) {
    const int64_t lanes = channels - c;
    Vec most(0.0f), sum(0.0f);
    for (int64_t y = 0; y < rows; ++y) {
      const T* const row = input + y * stride + c;
      for (int64_t x = 0; x < columns; ++x) {
        const Vec value = load_vec(row + x * channels, lanes);
        most = at::vec::clamp_min(value, most);
        sum = sum + value;
      }
    }
    store_vec(Vec::blendv(sum, most, sum == sum), output + c, lanes);
  }
}

template <typename T>
void pool_row(const ConvShape& shape, const MaxPool& pool, const T* input, int64_t rows,
              int64_t columns, T* output) {
  const int64_t stride = shape.q * shape.k;
  for (int64_t i = 0; i < columns; ++i, output += shape.k) {
    const Range window = pool.window(1, i, shape.q);
    const T* const first = input + window.begin * shape.k;
    if (rows == 3 && window.size() == 3) {
      pool_window(first, stride, 3, 3, shape.k, output);
    } else {
      pool_window(first, stride, rows, window.size(), shape.k, output);
    }
  }
}

}  // namespace

template <typename T>
PoolKernels<T> pool_kernels() {
  return {&pool_row<T>};
}

template PoolKernels<float> pool_kernels<float>();
template PoolKernels<c10::BFloat16> pool_kernels<c10::BFloat16>();
template PoolKernels<c10::Half> pool_kernels<c10::Half>();

}  // namespace fastres::cpu::CPU_CAPABILITY
