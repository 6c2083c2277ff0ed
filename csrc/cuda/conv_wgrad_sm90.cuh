// The gradient of a convolution's filters on sm_90a: a matrix product whose sum runs over pixels.
//
// As conv_fprop_sm90.cuh, but both operands lie in shared memory with the pixels as rows, which the
// tensor cores transpose, and a block computes one tile of one share of the pixels.
#pragma once

#include "conv_ring.cuh"
#include "conv_wgrad.h"

namespace fastres::cuda {

template <int kTileC>
struct WgradMemory {
  static constexpr int kStages = 6;
  static constexpr int kGradBytes = WgradTiles::kPixels * WgradTiles::kTileK * 2;
  static constexpr int kInputBytes = WgradTiles::kPixels * kTileC * 2;

  alignas(1024) char grad[kStages][kGradBytes];    // boxes of 64 pixels x 64 filters
  alignas(1024) char input[kStages][kInputBytes];  // boxes of 64 pixels x 64 channels
  uint64_t full[kStages], empty[kStages];
};

// Operand of a product whose sum runs over the rows of boxes of 64 x 64 values.
__device__ inline uint64_t transposed_operand(const char* box) {
  constexpr uint64_t kNextBox = 8192 >> 4, kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (shared_address(box) & 0x3ffff) >> 4 | kNextBox << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}

// The pixels of this block's share: first step and number of steps.
struct Share {
  int first, steps;

  __device__ Share(const ConvShape& shape, const WgradTiles& tiles)
      : first(tiles.share(blockIdx.x) * tiles.steps) {
    const int all = static_cast<int>(ceil_div(shape.pixels(), WgradTiles::kPixels));
    steps = all - first < tiles.steps ? all - first : tiles.steps;
  }
};

template <int kTileC>
__device__ void wgrad_produce(WgradMemory<kTileC>& m, const TensorMap& grad, const TensorMap& x,
                              const ConvShape& shape, const WgradTiles& tiles) {
  using M = WgradMemory<kTileC>;
  const Share share(shape, tiles);
  const int tap = tiles.tap(blockIdx.x), channel = tiles.channel(blockIdx.x);
  Stage stage;
  for (int step = 0; step < share.steps; ++step) {
    const int i = stage.index, pixel = (share.first + step) * WgradTiles::kPixels;
    const Window window = window_of(shape, pixel);
    barrier_wait(&m.empty[i], stage.parity ^ 1);
    barrier_expect(&m.full[i], M::kGradBytes + M::kInputBytes);
    for (int j = 0; j < WgradTiles::kTileK / 64; ++j) {
      load_2d(m.grad[i] + j * 8192, &grad, &m.full[i], tiles.filter(blockIdx.x) + j * 64, pixel);
    }
    for (int j = 0; j < kTileC / 64; ++j) {
      load_im2col(m.input[i] + j * 8192, &x, &m.full[i], channel + j * 64, window,
                  tap % shape.s * shape.dilation.w, tap / shape.s * shape.dilation.h);
    }
    stage.advance<M::kStages>();
  }
}

template <typename T, int kTileC>
__device__ void wgrad_consume(WgradMemory<kTileC>& m, const ConvShape& shape,
                              const WgradTiles& tiles, float* partial) {
  using M = WgradMemory<kTileC>;
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  float sum[kTileC / 2] = {};
  Stage stage;
  multiply<T, true, M::kStages>(
      m.full, m.empty, sum, stage, Share(shape, tiles).steps, lane, [](int) {},
      [&](int i) { return transposed_operand(m.grad[i] + group * 8192); },
      [&](int i) { return transposed_operand(m.input[i]); });
  const int warp = threadIdx.x % 128 / 32;
  const int64_t row = int64_t(shape.r) * shape.s * shape.c;  // of one filter
  float* to = partial + tiles.share(blockIdx.x) * shape.k * row + tiles.tap(blockIdx.x) * shape.c;
#pragma unroll
  for (int j = 0; j < kTileC / 8; ++j) {
    const int channel = tiles.channel(blockIdx.x) + 8 * j + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int filter = tiles.filter(blockIdx.x) + group * 64 + warp * 16 + lane / 4 + 8 * h;
      if (filter >= shape.k || channel >= shape.c) continue;
      store<2>(to + filter * row + channel,
               Pack<float, 2>{{sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]}});
    }
  }
}

template <typename T, int kTileC>
__global__ void __launch_bounds__(kConvThreads, 1)
    conv_wgrad_sm90(const __grid_constant__ TensorMap grad, const __grid_constant__ TensorMap x,
                    const __grid_constant__ ConvShape shape, const WgradTiles tiles,
                    float* partial) {
#if defined(FASTRES_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using M = WgradMemory<kTileC>;
  static_assert(sizeof(M) <= 227 * 1024, "more than a multiprocessor's shared memory");
  M& m = *reinterpret_cast<M*>(dynamic_shared());
  if (threadIdx.x == 0) {
    init_ring<M::kStages>(m.full, m.empty);
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) wgrad_produce(m, grad, x, shape, tiles);
  } else {
    take_registers<232>();
    wgrad_consume<T>(m, shape, tiles, partial);
  }
#else
  __trap();  // the host starts it on sm_90 only
#endif
}

// The sum of the shares, in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    conv_wgrad_sum(const float* __restrict__ partial, int shares, int64_t n, T* __restrict__ out) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (i >= n) return;  // n is a multiple of 4, as are the channels
  Pack<float, 4> sum = load<4>(partial + i);
  for (int share = 1; share < shares; ++share) {
    const auto values = load<4>(partial + share * n + i);
    for (int j = 0; j < 4; ++j) sum.value[j] += values.value[j];
  }
  Pack<T, 4> result;
  for (int j = 0; j < 4; ++j) narrow(sum.value[j], result.value[j]);
  store<4>(out + i, result);
}

// Launches what computes one call: the host's code, free of torch.
template <typename T, typename Queue>
void conv_wgrad_sm90_run(const Queue& queue, const ConvShape& shape, const ConvWgrad& w,
                         int multiprocessors) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  const WgradTiles tiles = WgradTiles::of(shape, multiprocessors);
  const TensorMap grad = encode(output_map(w.grad_output, kBfloat16, shape)),
                  x = encode(input_map(w.input, kBfloat16, shape, WgradTiles::kPixels));
  const auto launch = [&](auto tile) {
    constexpr int kTileC = decltype(tile)::value;
    queue.with_shared(conv_wgrad_sm90<T, kTileC>, tiles.blocks(), kConvThreads,
                      sizeof(WgradMemory<kTileC>), grad, x, shape, tiles, w.partial);
  };
  if (tiles.tile_c == 128)
    launch(std::integral_constant<int, 128>());
  else
    launch(std::integral_constant<int, 64>());
  const int64_t n = int64_t(shape.k) * shape.r * shape.s * shape.c;
  queue(conv_wgrad_sum<T>, ceil_div(n / 4, kThreads), kThreads, w.partial, tiles.shares, n,
        static_cast<T*>(w.grad_filter));
}

}  // namespace fastres::cuda
