// bn_relu: statistics in two levels, then normalise, add and clamp in one pass.
//
// A block reduces one segment of its channels' values; a warp for every channel merges the segments
// in their order. No atomics, so two runs give the same bits.
#pragma once

#include "bn_relu_walk.cuh"

namespace fastres::cuda {

// moments (channels, segments). The pivot is the mean of the block's first packs. By Cauchy and
// Schwarz n * (mean - pivot)^2 is at most the squares times the number of packs a thread has: what
// cancels in the end is worth a few bits at worst, be the mean 1e4 times the deviation.
template <typename T, int N, bool kSideBySide>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_moments(const T* __restrict__ x, Moments<acc_t<T>>* __restrict__ moments, Cut cut) {
  using A = acc_t<T>;
  using W = Walk<N, kSideBySide>;
  constexpr int kChannels = W::kChannels;
  const W walk(cut);
  A pivot[kChannels + 1] = {}, sum[kChannels] = {}, squares[kChannels] = {}, count[1] = {};
  if (const int64_t first = walk.first(); first >= 0) {
    const auto values = load<N>(x + first);
    for (int j = 0; j < N; ++j) pivot[j % kChannels] += widen(values.value[j]);
    pivot[kChannels] = N / kChannels;
  }
  block_sum(pivot, walk.stride());
  for (int j = 0; j < kChannels; ++j) {
    pivot[j] /= pivot[kChannels];
    if (!(fabs(pivot[j]) < A(INFINITY))) pivot[j] = 0;  // else x - pivot would be NaN
  }
  const auto read = [&](int64_t offset) { return load<N>(x + offset); };
  walk.template for_each<4>(read, [&](int64_t, const Pack<T, N>& values) {
    for (int j = 0; j < N; ++j) {
      const A deviation = widen(values.value[j]) - pivot[j % kChannels];
      sum[j % kChannels] += deviation;
      squares[j % kChannels] += deviation * deviation;
    }
    count[0] += N / kChannels;
  });
  block_sum(sum, walk.stride());
  block_sum(squares, walk.stride());
  block_sum(count, walk.stride());
  if (!walk.writes()) return;
  for (int j = 0; j < kChannels; ++j) {
    const A around = squares[j] - sum[j] * sum[j] / count[0];
    moments[(walk.channel() + j) * cut.segments + walk.segment()] = {
        count[0], pivot[j], sum[j], around < 0 ? A(0) : around};  // NaN stays
  }
}

// Merges the segments of a channel (Chan, Golub, LeVeque 1979), a warp for each. The one place
// where running statistics are updated.
template <typename A>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_finish_moments(const Moments<A>* __restrict__ moments, int64_t channels,
                           int64_t segments, Statistics<A> s) {
  const int64_t channel = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (channel >= channels) return;  // the whole warp
  const int lane = threadIdx.x % 32;
  double count = 0, sum = 0, squares = 0;
  for (int64_t i = lane; i < segments; i += 32) {
    const Moments<A> m = moments[channel * segments + i];
    count += m.count;
    sum += double(m.pivot) * m.count + m.sum;
  }
  count = warp_sum(count);
  const double mean = warp_sum(sum) / count;
  for (int64_t i = lane; i < segments; i += 32) {
    const Moments<A> m = moments[channel * segments + i];
    const double delta = m.pivot + double(m.sum) / m.count - mean;
    squares += m.squares + m.count * delta * delta;
  }
  squares = warp_sum(squares);
  if (lane > 0) return;
  s.mean[channel] = A(mean);
  s.invstd[channel] = A(1 / sqrt(squares / count + s.eps));
  if (s.running_mean == nullptr) return;
  const A momentum = A(s.momentum);
  A &running_mean = s.running_mean[channel], &running_var = s.running_var[channel];
  running_mean = (1 - momentum) * running_mean + momentum * A(mean);
  running_var = (1 - momentum) * running_var + momentum * A(squares / (count - 1));
}

// The running statistics as those of a batch.
template <typename A>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_frozen_moments(int64_t channels, Statistics<A> s) {
  const int64_t channel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= channels) return;
  s.mean[channel] = s.running_mean[channel];
  s.invstd[channel] = A(1 / sqrt(s.running_var[channel] + s.eps));
}

// y = act((x - mean) * weight * invstd + bias + residual); residual may be null.
template <typename T, int N, bool kSideBySide>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_apply(const T* __restrict__ x, const T* __restrict__ residual, T* __restrict__ y,
                  Vectors<acc_t<T>> vectors, bool relu, Cut cut) {
  using A = acc_t<T>;
  using W = Walk<N, kSideBySide>;
  const W walk(cut);
  if (!walk.serves()) return;
  Coefficients<A> k[W::kChannels];
  for (int j = 0; j < W::kChannels; ++j) k[j] = coefficients(vectors, walk.channel() + j);
  struct Operands {
    Pack<T, N> x, residual;
  };
  const auto read = [&](int64_t offset) {
    return Operands{load<N>(x + offset), residual ? load<N>(residual + offset) : Pack<T, N>{}};
  };
  walk.template for_each<4>(read, [&](int64_t offset, const Operands& in) {
    Pack<T, N> out;
    for (int j = 0; j < N; ++j) {
      A value = k[j % W::kChannels](widen(in.x.value[j]));
      if (residual) value += widen(in.residual.value[j]);
      if (relu && value <= 0) value = 0;  // NaN stays
      narrow(value, out.value[j]);
    }
    store<N>(y + offset, out);
  });
}

// Blocks of a kernel that has a warp for every channel.
inline int64_t warps_of_blocks(int64_t channels) { return ceil_div(channels * 32, kThreads); }

// Launches what computes one call: the host's code, free of torch.
template <typename T, typename Queue>
void bn_relu_run(const Queue& queue, const Activation& a, const BnRelu<T>& b, int multiprocessors) {
  using A = acc_t<T>;
  with_form<T>(a, all_aligned(b), [&](auto pack, auto side_by_side) {
    constexpr int N = decltype(pack)::value;
    constexpr bool kSideBySide = decltype(side_by_side)::value;
    if (b.training && b.statistics.mean) {
      const Cut cut = cut_to_reduce(a, N, multiprocessors);
      if (b.segments == 0) {
        queue(bn_relu_moments<T, N, kSideBySide>, cut.blocks(), kThreads, b.input, b.moments, cut);
      }
      queue(bn_relu_finish_moments<A>, warps_of_blocks(a.channels), kThreads, b.moments, a.channels,
            b.segments > 0 ? b.segments : int64_t(cut.segments), b.statistics);
    } else if (b.statistics.mean) {
      queue(bn_relu_frozen_moments<A>, ceil_div(a.channels, kThreads), kThreads, a.channels,
            b.statistics);
    }
    if (b.output == nullptr) return;
    const Cut cut = cut_to_apply(a, N, multiprocessors);
    queue(bn_relu_apply<T, N, kSideBySide>, cut.blocks(), kThreads, b.input, b.residual, b.output,
          b.vectors, b.relu, cut);
  });
}

}  // namespace fastres::cuda
