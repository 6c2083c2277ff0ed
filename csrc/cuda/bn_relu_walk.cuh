// What the kernels of bn_relu share: the walk over a segment, a channel's coefficients, sums over
// the threads of a block.
#pragma once

#include "bn_relu.h"

namespace fastres::cuda {

// y = (x - mean) * scale + shift
template <typename A>
struct Coefficients {
  A mean, scale, shift;

  __device__ A operator()(A x) const { return fma(x - mean, scale, shift); }
};

template <typename A>
__device__ inline Coefficients<A> coefficients(const Vectors<A>& v, int64_t channel) {
  const A weight = v.weight ? v.weight[channel] : A(1);
  return {v.mean[channel], v.invstd[channel] * weight, v.bias ? v.bias[channel] : A(0)};
}

// This thread's place in its block's segment.
template <int N, bool kSideBySide>
class Walk {
 public:
  // Channels of a thread: one for each value of its packs, or one for all.
  static constexpr int kChannels = kSideBySide ? N : 1;

  __device__ explicit Walk(const Cut& cut)
      : cut_(cut),
        index_(blockIdx.x / cut.channel_blocks),
        x_(threadIdx.x % cut.tile.across),
        y_(threadIdx.x / cut.tile.across) {
    const int64_t block = blockIdx.x % cut.channel_blocks;
    channel_ = kSideBySide ? (block * cut.tile.across + x_) * N : block;
  }

  // Blocks that are neighbours serve neighbouring channels of the same segment: what runs together
  // reads whole pages of memory.
  __device__ int64_t segment() const { return index_; }

  __device__ int64_t channel() const { return channel_; }

  // Whether the channels exist: the last block of channels may have too many threads.
  __device__ bool serves() const { return channel_ < cut_.activation.channels; }

  // use(offset, load(offset)) for every pack of this thread, kBatch loads before the first use:
  // that keeps the memory busy. The compiler, which sees stores between, may not do so.
  template <int kBatch, typename Load, typename Use>
  __device__ void for_each(Load load, Use use) const {
    if (!serves()) return;
    const Activation& a = cut_.activation;
    const Segment s = cut_.segment(index_);
    if constexpr (kSideBySide) {
      const int64_t step = cut_.tile.down * a.channels, first = s.top * a.channels + channel_;
      in_batches<kBatch>(first + y_ * a.channels, s.bottom * a.channels, step, load, use);
    } else {
      for (int64_t image = s.top + y_; image < s.bottom; image += cut_.tile.down) {
        const int64_t plane = (image * a.channels + channel_) * a.inner;
        in_batches<kBatch>(plane + (s.left + x_) * N, plane + s.right * N, cut_.tile.across * N,
                           load, use);
      }
    }
  }

  // Of this thread's first pack, or -1 where it has none.
  __device__ int64_t first() const {
    const Activation& a = cut_.activation;
    const Segment s = cut_.segment(index_);
    if (!serves() || s.top + y_ >= s.bottom) return -1;
    if constexpr (kSideBySide) return (s.top + y_) * a.channels + channel_;
    if (s.left + x_ >= s.right) return -1;
    return ((s.top + y_) * a.channels + channel_) * a.inner + (s.left + x_) * N;
  }

  // Threads that are this many apart serve the same channels.
  __device__ int stride() const { return kSideBySide ? cut_.tile.across : 1; }

  // Of the threads that serve the same channels, the one that writes what they found.
  __device__ bool writes() const { return threadIdx.x < stride() && serves(); }

 private:
  template <int kBatch, typename Load, typename Use>
  __device__ static void in_batches(int64_t at, int64_t end, int64_t step, Load load, Use use) {
    for (; at + (kBatch - 1) * step < end; at += kBatch * step) {
      decltype(load(at)) values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) values[i] = load(at + i * step);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) use(at + i * step, values[i]);
    }
    for (; at < end; at += step) use(at, load(at));
  }

  const Cut& cut_;
  uint32_t index_;
  int64_t channel_;
  int x_, y_;
};

// Every thread's value becomes the sum over the threads that are a multiple of `stride` apart, a
// power of 2, taken as a tree: the same order in every run.
template <int N, typename A>
__device__ void block_sum(A (&value)[N], int stride) {
  __shared__ A partial[N][kThreads];
  const int thread = threadIdx.x;
  for (int j = 0; j < N; ++j) partial[j][thread] = value[j];
  for (int half = kThreads / 2; half >= stride; half /= 2) {
    __syncthreads();
    if (thread < half) {
      for (int j = 0; j < N; ++j) partial[j][thread] += partial[j][thread + half];
    }
  }
  __syncthreads();
  for (int j = 0; j < N; ++j) value[j] = partial[j][thread % stride];
  __syncthreads();  // before the next sum
}

// The sum over a warp, in every lane.
__device__ inline double warp_sum(double value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

}  // namespace fastres::cuda
