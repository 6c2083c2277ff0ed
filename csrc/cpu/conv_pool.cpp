#include "conv_pool.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <atomic>
#include <cstring>

#include "conv_run.h"
#include "memory.h"

namespace fastres::cpu {
namespace {

// Of the convolution's rows at hand: with what it packs they share the second-level cache.
constexpr int64_t kBandBytes = 384 * 1024;

// Rows of a convolution's output that one thread has at hand.
template <typename T>
class Band {
 public:
  Band(const ConvShape& shape, ConvAlgorithm algorithm, const ConvOperands<T>& operands,
       const MaxPool& pool)
      : shape_(shape),
        algorithm_(algorithm),
        operands_(operands),
        pool_(pool),
        tile_(is_winograd(algorithm) ? winograd_form(algorithm, shape.r).m : 1) {
    const int64_t bytes = row_values() * static_cast<int64_t>(sizeof(T));
    const int64_t rows = (kBandBytes / bytes - pool.kernel[0]) / pool.stride[0] + 1;
    height_ = std::max(int64_t{1}, rows);
    const int64_t most = (height_ - 1) * pool.stride[0] + pool.kernel[0] + 2 * tile_;
    static thread_local Scratch own;
    memory_ = reinterpret_cast<T*>(own.of_size(ceil_div(most * bytes, sizeof(float))));
  }

  // Rows of the pool that can be computed at once.
  int64_t height() const { return height_; }

  // Computes what these rows of the pool need of the image, and are not at hand; false where a sum
  // was not finite. Tiles begin where they would without bands, so nothing depends on the threads.
  bool move(int64_t image, Range pooled) {
    const int64_t begin = window(pooled.begin).begin;
    const int64_t end = std::min(round_up(window(pooled.end - 1).end, tile_), shape_.p);
    Range missing{begin / tile_ * tile_, end};
    if (image == image_ && held_.begin <= begin && begin < held_.end) {
      std::memmove(memory_, row(begin), (held_.end - begin) * row_values() * sizeof(T));
      missing.begin = held_.end;
      held_.begin = begin;
    } else {
      held_.begin = missing.begin;
    }
    image_ = image;
    held_.end = std::max(missing.begin, end);
    return missing.begin >= end || convolve(missing);
  }

  Range window(int64_t pooled) const { return pool_.window(0, pooled, shape_.p); }
  T* row(int64_t i) const { return memory_ + (i - held_.begin) * row_values(); }

 private:
  int64_t row_values() const { return shape_.q * shape_.k; }

  bool convolve(Range rows) const {
    ConvShape part = shape_;
    part.n = 1;
    part.p = rows.size();
    part.padding[0] -= rows.begin * shape_.stride[0];
    ConvOperands<T> operands = operands_;
    operands.input += image_ * shape_.h * shape_.w * shape_.c;
    operands.output = row(rows.begin);
    return run_conv<T>(part, algorithm_, operands);
  }

  const ConvShape& shape_;
  const ConvAlgorithm algorithm_;
  const ConvOperands<T>& operands_;
  const MaxPool& pool_;
  const int64_t tile_;
  int64_t height_, image_ = -1;
  Range held_{0, 0};
  T* memory_;
};

}  // namespace

template <typename T>
bool run_pooled_conv(const ConvShape& shape, ConvAlgorithm algorithm,
                     const ConvOperands<T>& operands, const MaxPool& pool) {
  static const auto kernels = FASTRES_SELECT_VECTOR_KERNELS(pool_kernels, T);
  const int64_t rows = pool.output_size(0, shape.p), columns = pool.output_size(1, shape.q);
  std::atomic<bool> finite{true};
  // Inside, run_conv stays on its thread.
  at::parallel_for(0, shape.n * rows, 1, [&](int64_t begin, int64_t end) {
    Band<T> band(shape, algorithm, operands, pool);
    while (begin < end) {
      const int64_t image = begin / rows, first = begin % rows;
      const int64_t last = std::min({first + band.height(), rows, first + end - begin});
      if (!band.move(image, {first, last})) finite.store(false, std::memory_order_relaxed);
      for (int64_t i = first; i < last; ++i, ++begin) {
        const Range window = band.window(i);
        kernels.row(shape, pool, band.row(window.begin), window.size(), columns,
                    operands.output + begin * columns * shape.k);
      }
    }
  });
  return finite;
}

template bool run_pooled_conv(const ConvShape&, ConvAlgorithm, const ConvOperands<float>&,
                              const MaxPool&);
template bool run_pooled_conv(const ConvShape&, ConvAlgorithm, const ConvOperands<c10::BFloat16>&,
                              const MaxPool&);
template bool run_pooled_conv(const ConvShape&, ConvAlgorithm, const ConvOperands<c10::Half>&,
                              const MaxPool&);

}  // namespace fastres::cpu
