// Convolution of 16-bit activations on sm_90a as an implicit matrix product, with an epilogue.
//
// A persistent block has three warpgroups. One thread of the first asks the tensor memory
// accelerator for tiles: of the input (im2col: 128 windows x 64 channels of one filter tap) and of
// the filters, in a ring of stages guarded by barriers, and of the residual. The other two multiply
// 64 of the rows each, apply the epilogue in registers, and hand the output back through shared
// memory. No atomics: two runs give the same bits.
#pragma once

#include "conv_fprop.h"
#include "conv_ring.cuh"

namespace fastres::cuda {

template <int kTileK>
struct ConvMemory {
  static constexpr int kStages = kTileK == 256 ? 3 : kTileK == 128 ? 5 : 6;
  static constexpr int kInputBytes = ConvTiles::kTileM * 128, kFilterBytes = kTileK * 128;
  static constexpr int kHalfBytes = 64 * kTileK * 2;  // of the output tile, a warpgroup's rows

  alignas(1024) char input[kStages][kInputBytes];
  alignas(1024) char filter[kStages][kFilterBytes];
  alignas(1024) char output[2][kHalfBytes];  // where the residual arrives
  float mean[8][kTileK], squares[8][kTileK];
  uint64_t full[kStages], empty[kStages], residual_full[2], residual_empty[2];
};

// Operand of a product: rows of 128 bytes, swizzled; eight of them are 1024 bytes.
__device__ inline uint64_t operand(const char* rows) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (shared_address(rows) & 0x3ffff) >> 4 | uint64_t(1) << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}

// --- the producer ---

template <int kTileK>
__device__ void conv_produce(ConvMemory<kTileK>& m, const TensorMap& x, const TensorMap& w,
                             const TensorMap& residual, const ConvShape& shape,
                             const ConvTiles& tiles, bool with_residual) {
  using M = ConvMemory<kTileK>;
  Stage stage;
  int parity = 0;  // of the residual's buffers
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const int pixel = tiles.pixel(tile), filter = tiles.filter(tile);
    const Window window = window_of(shape, pixel);
    for (int r = 0; r < shape.r; ++r) {
      for (int s = 0; s < shape.s; ++s) {
        for (int c = 0; c < shape.c; c += ConvTiles::kChunk) {
          const int i = stage.index;
          barrier_wait(&m.empty[i], stage.parity ^ 1);
          barrier_expect(&m.full[i], M::kInputBytes + M::kFilterBytes);
          load_im2col(m.input[i], &x, &m.full[i], c, window, s * shape.dilation.w,
                      r * shape.dilation.h);
          load_3d(m.filter[i], &w, &m.full[i], c, r * shape.s + s, filter);
          stage.advance<M::kStages>();
        }
      }
    }
    if (!with_residual) continue;
    for (int g = 0; g < 2; ++g) {
      barrier_wait(&m.residual_empty[g], parity ^ 1);
      barrier_expect(&m.residual_full[g], M::kHalfBytes);
      for (int j = 0; j < kTileK / 64; ++j) {
        load_2d(m.output[g] + j * 8192, &residual, &m.residual_full[g], filter + j * 64,
                pixel + g * 64);
      }
    }
    parity ^= 1;
  }
}

// --- the consumers ---

// Where the values of a thread's rows lie in its warpgroup's half of the output tile: 64 x 64
// boxes, whose rows of 128 bytes are swizzled.
__device__ inline char* place_in(char* half, int row, int column) {
  return half + column / 64 * 8192 + row * 128 + (column % 64 * 2 ^ (row & 7) << 4);
}

// Moments of a warp's 16 rows: about their own mean, so nothing cancels. `rows`: those that exist.
template <int kTileK>
__device__ void warp_moments(const float (&y)[kTileK / 2], float* mean, float* squares, int rows,
                             int lane) {
#pragma unroll
  for (int j = 0; j < kTileK / 4; ++j) {  // columns: 8 * (j / 2) + lane % 4 * 2 + j % 2
    const float top = y[j / 2 * 4 + j % 2], bottom = y[j / 2 * 4 + j % 2 + 2];
    const bool has_top = lane / 4 < rows, has_bottom = lane / 4 + 8 < rows;
    float centre = (has_top ? top : 0) + (has_bottom ? bottom : 0);
#pragma unroll
    for (int i = 4; i < 32; i *= 2) centre += __shfl_xor_sync(0xffffffffu, centre, i);
    centre /= float(rows > 0 ? rows : 1);
    const float a = has_top ? top - centre : 0, b = has_bottom ? bottom - centre : 0;
    float square = a * a + b * b;
#pragma unroll
    for (int i = 4; i < 32; i *= 2) square += __shfl_xor_sync(0xffffffffu, square, i);
    const int column = j / 2 * 8 + lane % 4 * 2 + j % 2;
    if (lane < 4) mean[column] = centre, squares[column] = square;
  }
}

// Merges the moments of the eight warps, the filters shared out among the threads.
template <int kTileK>
__device__ void tile_moments(const ConvMemory<kTileK>& m, const ConvShape& shape,
                             const ConvTiles& tiles, int tile, Moments<float>* moments) {
  const int rows = static_cast<int>(shape.pixels() - tiles.pixel(tile));
  for (int k = threadIdx.x - 128; k < kTileK; k += 256) {
    const int filter = tiles.filter(tile) + k;
    if (filter >= shape.k) break;
    float count = 0, mean = 0, squares = 0;
    for (int warp = 0; warp < 8 && warp * 16 < rows; ++warp) {
      const float n = rows - warp * 16 < 16 ? rows - warp * 16 : 16;
      const float delta = m.mean[warp][k] - mean, share = n / (count + n);
      squares += m.squares[warp][k] + delta * delta * count * share;
      mean += delta * share;
      count += n;
    }
    moments[int64_t(filter) * tiles.down + tile / tiles.across] = {count, mean, 0, squares};
  }
}

template <typename T, int kTileK, Epilogue kEpilogue>
__device__ void conv_finish(ConvMemory<kTileK>& m, float (&sum)[kTileK / 2], int parity,
                            const ConvEpilogue& e, const ConvShape& shape, const ConvTiles& tiles,
                            int tile, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  char* half = m.output[group];
  if (e.residual) barrier_wait(&m.residual_full[group], parity);
  group_sync(1 + group, 128);  // the last tile has left the buffer
#pragma unroll
  for (int j = 0; j < kTileK / 8; ++j) {
    const int column = 8 * j + lane % 4 * 2;
    float2 scale = {1, 1}, shift = {0, 0};
    if (const int k = tiles.filter(tile) + column; kEpilogue == Epilogue::kApply && k < shape.k) {
      if (e.scale) scale = *reinterpret_cast<const float2*>(e.scale + k);
      if (e.shift) shift = *reinterpret_cast<const float2*>(e.shift + k);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float &left = sum[4 * j + 2 * h], &right = sum[4 * j + 2 * h + 1];
      T* at = reinterpret_cast<T*>(place_in(half, warp * 16 + lane / 4 + 8 * h, column));
      if (kEpilogue == Epilogue::kApply) {
        left = fmaf(left, scale.x, shift.x);
        right = fmaf(right, scale.y, shift.y);
        if (e.residual) {
          const auto skip = load<2>(at);
          left += widen(skip.value[0]);
          right += widen(skip.value[1]);
        }
        if (e.relu && left <= 0) left = 0;  // NaN stays
        if (e.relu && right <= 0) right = 0;
      }
      Pack<T, 2> y;
      narrow(left, y.value[0]);
      narrow(right, y.value[1]);
      store<2>(at, y);
      if (kEpilogue == Epilogue::kMoments) left = widen(y.value[0]), right = widen(y.value[1]);
    }
  }
  if (kEpilogue == Epilogue::kMoments) {
    const int64_t left = shape.pixels() - tiles.pixel(tile) - group * 64 - warp * 16;
    warp_moments<kTileK>(sum, m.mean[group * 4 + warp], m.squares[group * 4 + warp],
                         left < 0    ? 0
                         : left < 16 ? int(left)
                                     : 16,
                         lane);
  }
}

// From shared memory to where it belongs; what lies outside of the output is left out.
template <int kTileK>
__device__ void conv_store(ConvMemory<kTileK>& m, const TensorMap& y, const ConvTiles& tiles,
                           int tile, int group, bool with_residual) {
  fence_shared();
  group_sync(1 + group, 128);
  if (threadIdx.x % 128 != 0) return;
  for (int j = 0; j < kTileK / 64; ++j) {
    store_2d(&y, m.output[group] + j * 8192, tiles.filter(tile) + j * 64,
             tiles.pixel(tile) + group * 64);
  }
  stores_wait_read();
  if (with_residual) barrier_arrive(&m.residual_empty[group]);
}

template <typename T, int kTileK, Epilogue kEpilogue>
__device__ void conv_consume(ConvMemory<kTileK>& m, const TensorMap& y, const ConvEpilogue& e,
                             const ConvShape& shape, const ConvTiles& tiles) {
  const int group = threadIdx.x / 128 - 1, steps = steps_of(shape);
  Stage stage;
  int parity = 0;
  float sum[kTileK / 2];
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    multiply<T, false, ConvMemory<kTileK>::kStages>(
        m.full, m.empty, sum, stage, steps, threadIdx.x % 32,
        [&](int i) { return operand(m.input[i] + group * 8192); },
        [&](int i) { return operand(m.filter[i]); });
    conv_finish<T, kTileK, kEpilogue>(m, sum, parity, e, shape, tiles, tile, group);
    conv_store(m, y, tiles, tile, group, e.residual);
    if (kEpilogue == Epilogue::kMoments) {
      group_sync(3, 256);  // all eight warps have theirs
      tile_moments(m, shape, tiles, tile, e.moments);
      group_sync(3, 256);
    }
    parity ^= 1;
  }
  if (threadIdx.x % 128 == 0) stores_wait();
}

template <typename T, int kTileK, Epilogue kEpilogue>
__global__ void __launch_bounds__(kConvThreads, 1)
    conv_fprop_sm90(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                    const __grid_constant__ TensorMap residual, const __grid_constant__ TensorMap y,
                    const __grid_constant__ ConvShape shape, const ConvTiles tiles,
                    const ConvEpilogue epilogue) {
#if defined(FASTRES_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using M = ConvMemory<kTileK>;
  static_assert(sizeof(M) <= 227 * 1024, "more than a multiprocessor's shared memory");
  M& m = *reinterpret_cast<M*>(dynamic_shared());
  if (threadIdx.x == 0) {
    init_ring<M::kStages>(m.full, m.empty);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&m.residual_full[i], 1);
      barrier_init(&m.residual_empty[i], 1);
    }
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) conv_produce(m, x, w, residual, shape, tiles, epilogue.residual);
  } else {
    take_registers<232>();
    conv_consume<T, kTileK, kEpilogue>(m, y, epilogue, shape, tiles);
  }
#else
  __trap();  // the host starts it on sm_90 only
#endif
}

// Launches one convolution whose shape fits_im2col(): the host's code, free of torch.
template <typename T, Epilogue kEpilogue, typename Queue>
void conv_fprop_sm90_run(const Queue& queue, const ConvShape& shape, const ConvFprop& f, int tile_k,
                         int multiprocessors) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  const ConvTiles tiles = ConvTiles::of(shape, tile_k);
  const TensorMap x = encode(input_map(f.input, kBfloat16, shape)),
                  w = encode(filter_map(f.filter, kBfloat16, shape, tile_k)),
                  y = encode(output_map(f.output, kBfloat16, shape)),
                  residual = f.residual ? encode(output_map(f.residual, kBfloat16, shape)) : y;
  const int blocks = std::min(tiles.count(), multiprocessors);
  const auto launch = [&](auto tile) {
    constexpr int kTileK = decltype(tile)::value;
    queue.with_shared(conv_fprop_sm90<T, kTileK, kEpilogue>, blocks, kConvThreads,
                      sizeof(ConvMemory<kTileK>), x, w, residual, y, shape, tiles, f.epilogue);
  };
  if (tile_k == 256)
    launch(std::integral_constant<int, 256>());
  else if (tile_k == 128)
    launch(std::integral_constant<int, 128>());
  else
    launch(std::integral_constant<int, 64>());
}

}  // namespace fastres::cuda
