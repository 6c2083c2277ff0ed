// bn_relu_backward: the sums of the gradient in two levels, then the gradients in one pass.
#pragma once

#include "bn_relu.cuh"

namespace fastres::cuda {

// What backward reads of a place; y where the mask is made of it.
template <typename T, int N>
struct Operands {
  Pack<T, N> x, dy, y;
};

template <int N, typename T>
__device__ Operands<T, N> operands_at(const Gradients<T>& p, Mask mask, int64_t offset) {
  return {load<N>(p.input + offset), load<N>(p.grad_output + offset),
          mask == Mask::kFromOutput ? load<N>(p.output + offset) : Pack<T, N>{}};
}

// The gradient that ReLU let pass; where the output is NaN it passes.
template <typename T, typename A>
__device__ A masked(T grad_output, T input, T output, const Coefficients<A>& k, Mask mask) {
  const A g = widen(grad_output);
  if (mask == Mask::kNone) return g;
  T y = output;
  if (mask == Mask::kFromInput) narrow(k(widen(input)), y);
  return widen(y) <= 0 ? A(0) : g;
}

// sums (channels, segments); writes grad_residual where it is not null.
template <typename T, int N, bool kSideBySide>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_backward_sums(Gradients<T> p, Vectors<acc_t<T>> vectors, Mask mask,
                          Sums<acc_t<T>>* __restrict__ sums, Cut cut) {
  using A = acc_t<T>;
  using W = Walk<N, kSideBySide>;
  constexpr int kChannels = W::kChannels;
  const W walk(cut);
  Coefficients<A> k[kChannels] = {};
  A sum_g[kChannels] = {}, sum_gx[kChannels] = {};
  if (walk.serves()) {
    for (int j = 0; j < kChannels; ++j) k[j] = coefficients(vectors, walk.channel() + j);
  }
  const auto read = [&](int64_t offset) { return operands_at<N>(p, mask, offset); };
  walk.template for_each<2>(read, [&](int64_t offset, const Operands<T, N>& in) {
    Pack<T, N> passed;
    for (int j = 0; j < N; ++j) {
      const A g = masked(in.dy.value[j], in.x.value[j], in.y.value[j], k[j % kChannels], mask);
      sum_g[j % kChannels] += g;
      sum_gx[j % kChannels] += g * (widen(in.x.value[j]) - k[j % kChannels].mean);
      narrow(g, passed.value[j]);
    }
    if (p.grad_residual) store<N>(p.grad_residual + offset, passed);
  });
  block_sum(sum_g, walk.stride());
  block_sum(sum_gx, walk.stride());
  if (!walk.writes()) return;
  for (int j = 0; j < kChannels; ++j) {
    sums[(walk.channel() + j) * cut.segments + walk.segment()] = {sum_g[j], sum_gx[j]};
  }
}

// A warp for every channel; grad_weight and grad_bias may be null.
template <typename A>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_finish_sums(const Sums<A>* __restrict__ sums, const A* __restrict__ invstd,
                        int64_t channels, int64_t segments, int64_t count,
                        Slopes<A>* __restrict__ slopes, A* __restrict__ grad_weight,
                        A* __restrict__ grad_bias) {
  const int64_t channel = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (channel >= channels) return;  // the whole warp
  const int lane = threadIdx.x % 32;
  double g = 0, gx = 0;
  for (int64_t i = lane; i < segments; i += 32) {
    const Sums<A> s = sums[channel * segments + i];
    g += s.g;
    gx += s.gx;
  }
  g = warp_sum(g);
  gx = warp_sum(gx);
  if (lane > 0) return;
  const double scale = invstd[channel];
  slopes[channel] = {A(gx * scale * scale / count), A(g / count)};
  if (grad_weight == nullptr) return;
  grad_weight[channel] = A(gx * scale);
  grad_bias[channel] = A(g);
}

// grad_input and grad_residual, where they are not null. Null slopes: the statistics are constants,
// grad_input = scale * g.
template <typename T, int N, bool kSideBySide>
__global__ void __launch_bounds__(kThreads, 2)
    bn_relu_backward_apply(Gradients<T> p, Vectors<acc_t<T>> vectors, Mask mask,
                           const Slopes<acc_t<T>>* __restrict__ slopes, Cut cut) {
  using A = acc_t<T>;
  using W = Walk<N, kSideBySide>;
  constexpr int kChannels = W::kChannels;
  const W walk(cut);
  if (!walk.serves()) return;
  Coefficients<A> k[kChannels];
  Slopes<A> s[kChannels] = {};
  for (int j = 0; j < kChannels; ++j) {
    k[j] = coefficients(vectors, walk.channel() + j);
    if (slopes) s[j] = slopes[walk.channel() + j];
  }
  const auto read = [&](int64_t offset) { return operands_at<N>(p, mask, offset); };
  walk.template for_each<2>(read, [&](int64_t offset, const Operands<T, N>& in) {
    Pack<T, N> dx, passed;
    for (int j = 0; j < N; ++j) {
      const Coefficients<A>& c = k[j % kChannels];
      A g = masked(in.dy.value[j], in.x.value[j], in.y.value[j], c, mask);
      narrow(g, passed.value[j]);
      if (slopes)
        g -= s[j % kChannels].offset + (widen(in.x.value[j]) - c.mean) * s[j % kChannels].slope;
      narrow(c.scale * g, dx.value[j]);
    }
    if (p.grad_residual) store<N>(p.grad_residual + offset, passed);
    if (p.grad_input) store<N>(p.grad_input + offset, dx);
  });
}

// Launches what computes one call: the host's code, free of torch.
template <typename T, typename Queue>
void bn_relu_backward_run(const Queue& queue, const Activation& a, const BnReluBackward<T>& b,
                          int multiprocessors) {
  using A = acc_t<T>;
  Gradients<T> p = b.activations;
  Mask mask = b.mask;
  const bool is_aligned = all_aligned(p);
  const bool statistics = b.training && p.grad_input;
  with_form<T>(a, is_aligned, [&](auto pack, auto side_by_side) {
    constexpr int N = decltype(pack)::value;
    constexpr bool kSideBySide = decltype(side_by_side)::value;
    if (statistics || b.grad_weight) {
      const Cut cut = cut_to_reduce(a, N, multiprocessors);
      if (b.segments == 0) {
        queue(bn_relu_backward_sums<T, N, kSideBySide>, cut.blocks(), kThreads, p, b.vectors, mask,
              b.sums, cut);
      }
      queue(bn_relu_finish_sums<A>, warps_of_blocks(a.channels), kThreads, b.sums, b.vectors.invstd,
            a.channels, b.segments > 0 ? b.segments : int64_t(cut.segments), a.count(), b.slopes,
            b.grad_weight, b.grad_bias);
      if (p.grad_residual) {  // is written, and masked: what is left to do reads it instead
        p.grad_output = p.grad_residual;
        p.grad_residual = nullptr;
        mask = Mask::kNone;
      }
    }
    if (!p.grad_input && !p.grad_residual) return;
    const Cut cut = cut_to_apply(a, N, multiprocessors);
    queue(bn_relu_backward_apply<T, N, kSideBySide>, cut.blocks(), kThreads, p, b.vectors, mask,
          statistics ? b.slopes : nullptr, cut);
  });
}

}  // namespace fastres::cuda
