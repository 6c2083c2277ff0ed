// The gradient of a convolution's filters on sm_90a: a matrix product whose sum runs over pixels.
//
// As conv_fprop_sm90.cuh, but both operands lie in shared memory with the pixels as rows, which the
// tensor cores transpose, and a block computes one tile of one share of the pixels.
#pragma once

#include "conv_ring.cuh"
#include "conv_wgrad.h"

namespace fastres::cuda {

template <int kTileK>
struct WgradMemory {
  static constexpr int kGradBytes = kTileK / 64 * kBoxBytes, kInputBytes = 2 * kBoxBytes;
  static constexpr int kStages = (192 << 10) / (kGradBytes + kInputBytes);

  alignas(1024) char grad[kStages][kGradBytes];
  alignas(1024) char input[kStages][kInputBytes];
  alignas(16) char norms[2][norm_bytes(WgradTiles::kChannels)];  // of the two groups
  uint64_t full[kStages], empty[kStages];
};

// The pixels of this block's share: first step and number of steps.
struct Share {
  int first, steps;

  __device__ Share(const ConvShape& shape, const WgradTiles& tiles)
      : first(tiles.share(blockIdx.x) * tiles.steps) {
    const int all = static_cast<int>(ceil_div(shape.pixels(), WgradTiles::kPixels));
    steps = all - first < tiles.steps ? all - first : tiles.steps;
  }
};

// The rows of a half of this block's tile: the block of the last one again where there is none.
struct WgradRows {
  bool exist;
  int r, s, channel;

  __device__ WgradRows(const ConvShape& shape, const WgradTiles& tiles, int half) {
    const int row = tiles.row(blockIdx.x, half);
    exist = row < tiles.rows;
    const int tap = tiles.tap(exist ? row : row - 1);
    r = tap / shape.s, s = tap % shape.s;
    channel = tiles.channel(exist ? row : row - 1);
  }
};

template <int kTileK>
__device__ void wgrad_produce(WgradMemory<kTileK>& m, const TensorMap& grad, const TensorMap& x,
                              const ConvShape& shape, const WgradTiles& tiles) {
  using M = WgradMemory<kTileK>;
  const Share share(shape, tiles);
  const WgradRows rows[2] = {{shape, tiles, 0}, {shape, tiles, 1}};
  const int filter = tiles.filter(blockIdx.x);
  Stage stage;
  for (int step = 0; step < share.steps; ++step) {
    const int i = stage.index, pixel = (share.first + step) * WgradTiles::kPixels;
    const Window window = window_of(shape, pixel);
    barrier_wait(&m.empty[i], stage.parity ^ 1);
    barrier_expect(&m.full[i], M::kGradBytes + M::kInputBytes);
    for (int j = 0; j < kTileK / 64; ++j) {
      load_2d(m.grad[i] + j * kBoxBytes, &grad, &m.full[i], filter + j * 64, pixel);
    }
    for (int half = 0; half < 2; ++half) {
      const WgradRows& at = rows[half];
      load_im2col(m.input[i] + half * kBoxBytes, &x, &m.full[i], at.channel, window,
                  at.s * shape.dilation.w, at.r * shape.dilation.h);
    }
    stage.advance<M::kStages>();
  }
}

template <typename T, int kTileK, bool kPrologue>
__device__ void wgrad_consume(WgradMemory<kTileK>& m, const ConvShape& shape,
                              const WgradTiles& tiles, const ConvWgrad& w) {
  using M = WgradMemory<kTileK>;
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const Share share(shape, tiles);
  const WgradRows at(shape, tiles, group);
  float sum[kTileK / 2] = {};
  Stage stage;
  int pixel = share.first * WgradTiles::kPixels;
  const auto box = [&](int i) { return m.input[i] + group * kBoxBytes; };
  NormTable table(m.norms[group], WgradTiles::kChannels);
  if constexpr (kPrologue) {
    table.fill(w.prologue, at.channel, shape.c - at.channel, threadIdx.x % 128, 128);
    group_sync(1 + group, 128);
  }
  multiply<T, true, M::kStages>(
      m.full, m.empty, sum, stage, share.steps, lane,
      [&](int i) {
        if constexpr (kPrologue) {
          const int first = pixel + box_row();
          const auto prepare = [&](auto has) {
            prepare_box<T>(box(i), shape.c - at.channel, has, table, group);
          };
          if (shape.is_padded()) {
            const Windows<4> windows(shape, first, 16);
            prepare([&](int row) { return windows.has(row, at.r, at.s); });
          } else {
            prepare([&](int row) { return first + 16 * row < shape.pixels(); });
          }
          pixel += WgradTiles::kPixels;
        }
      },
      [&](int i) { return operand<true>(box(i)); },
      [&](int i) { return operand<true>(m.grad[i]); });
  if (!at.exist) return;
  const int64_t row = int64_t(shape.r) * shape.s * shape.c;  // of one filter
  const int first = at.channel + threadIdx.x % 128 / 32 * 16 + lane / 4;
  float* to = w.partial + tiles.share(blockIdx.x) * shape.k * row +
              (at.r * shape.s + at.s) * int64_t(shape.c);
#pragma unroll
  for (int j = 0; j < kTileK / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int filter = tiles.filter(blockIdx.x) + 8 * j + lane % 4 * 2 + i % 2;
      const int channel = first + i / 2 * 8;
      if (filter < shape.k && channel < shape.c) to[filter * row + channel] = sum[4 * j + i];
    }
  }
}

template <typename T, int kTileK, bool kPrologue>
__global__ void __launch_bounds__(kConvThreads, 1)
    conv_wgrad_sm90(const __grid_constant__ TensorMap grad, const __grid_constant__ TensorMap x,
                    const __grid_constant__ ConvShape shape, const WgradTiles tiles,
                    const __grid_constant__ ConvWgrad w) {
#if defined(FASTRES_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using M = WgradMemory<kTileK>;
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
    wgrad_consume<T, kTileK, kPrologue>(m, shape, tiles, w);
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
  const auto launch = [&](auto tile, auto prologue) {
    constexpr int kTileK = decltype(tile)::value;
    queue.launch(conv_wgrad_sm90<T, kTileK, decltype(prologue)::value>,
                 {tiles.blocks(), kConvThreads, sizeof(WgradMemory<kTileK>)}, grad, x, shape, tiles,
                 w);
  };
  const auto launch_tile = [&](auto prologue) {
    if (tiles.tile_k == 256)
      launch(std::integral_constant<int, 256>(), prologue);
    else if (tiles.tile_k == 128)
      launch(std::integral_constant<int, 128>(), prologue);
    else
      launch(std::integral_constant<int, 64>(), prologue);
  };
  if (w.prologue.mean)
    launch_tile(std::true_type());
  else
    launch_tile(std::false_type());
  const int64_t n = int64_t(shape.k) * shape.r * shape.s * shape.c;
  queue(conv_wgrad_sum<T>, ceil_div(n / 4, kThreads), kThreads, w.partial, tiles.shares, n,
        static_cast<T*>(w.grad_filter));
}

}  // namespace fastres::cuda
