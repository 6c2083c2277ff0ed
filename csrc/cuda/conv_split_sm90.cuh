// Convolution in eval on sm_90a for outputs of few tiles: a network's last layers, or, of one
// image, all of them. A tile to a multiprocessor would leave most of them idle, and the others
// waiting for their filters: 3x3 of 512 channels at 7x7 has 4.7 MB of them and eight tiles.
//
// So the sum of a tile is split. Each block of a cluster multiplies a share of its steps, and hands
// the others, through distributed shared memory, what they are to finish: an equal part of the
// filters each. The shares are added in their order: two runs give the same bits.
//
// These launches are short. A block begins while the kernel before still runs, and asks for its
// filters meanwhile, as far as the chip's cache.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_ring.cuh"

namespace fastres::cuda {

constexpr int kSplitMultiply = 256;                 // threads: two warpgroups of 64 rows
constexpr int kSplitThreads = kSplitMultiply + 32;  // and a warp, of which one asks for operands

struct SplitMemory {
  static constexpr int kBlocks = 2;  // of a multiprocessor: the next kernel's beside this one's
  static constexpr int kStages = 3;
  static constexpr int kInputBytes = ConvTiles::kTileM * 128, kFilterBytes = kSplitTileK * 128;
  static constexpr int kEights = kSplitTileK / 8;  // filters in eights, as a thread has them

  alignas(1024) char input[kStages][kInputBytes];
  alignas(1024) char filter[kStages][kFilterBytes];
  float4 columns[kSplitTileK / 2];
  float4 parts[kEights][kSplitMultiply];  // of what this block finishes, every share's
  uint64_t full[kStages], empty[kStages];
};

// f(step) for a share's steps.
template <typename F>
__device__ void for_each_step(const ConvShape& shape, const SplitSteps& steps, F f) {
  auto step = Step<ConvTiles::kChunk>::at(shape, steps.first);
  for (int i = steps.first; i < steps.last; ++i) {
    f(step);
    step.advance(shape);
  }
}

__device__ inline void split_produce(SplitMemory& m, const TensorMap& input,
                                     const TensorMap& filter, const ConvShape& shape,
                                     const SplitSteps& steps, int pixel, int first_filter) {
  const Window window = window_of(shape, pixel);
  Stage stage;
  for_each_step(shape, steps, [&](const auto& at) {
    const int i = stage.index;
    barrier_wait(&m.empty[i], stage.parity ^ 1);
    barrier_expect(&m.full[i], SplitMemory::kInputBytes + SplitMemory::kFilterBytes);
    load_im2col(m.input[i], &input, &m.full[i], at.c, window, at.s * shape.dilation.w,
                at.r * shape.dilation.h);
    load_3d(m.filter[i], &filter, &m.full[i], at.c, at.r * shape.s + at.s, first_filter);
    stage.advance<SplitMemory::kStages>();
  });
}

// Multiplies a share of a tile that begins with `filter`, and hands its sums to those that finish
// them.
template <typename T>
__device__ void split_multiply(SplitMemory& m, const ConvFprop& f, const ConvShape& shape,
                               int steps, int filter) {
  if (const int i = threadIdx.x; i < kColumns<Epilogue::kApply, kSplitTileK>) {
    m.columns[i] = column_of<Epilogue::kApply, kSplitTileK>(f.epilogue, filter, shape.k, i);
  }
  const int group = threadIdx.x / 128, shares = cluster_size();
  Stage stage;
  float sum[kSplitTileK / 2];
  multiply<T, false, SplitMemory::kStages>(
      m.full, m.empty, sum, stage, steps, threadIdx.x % 32, [](int) {},
      [&](int i) { return operand<false>(m.input[i] + group * kBoxBytes); },
      [&](int i) { return operand<false>(m.filter[i]); });
  const int each = SplitMemory::kEights / shares;
#pragma unroll
  for (int j = 0; j < SplitMemory::kEights; ++j) {
    const int finishes = j * shares / SplitMemory::kEights;
    const int part = cluster_rank() * each + j - finishes * each;
    store_in_block(&m.parts[part][threadIdx.x], finishes,
                   {sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]});
  }
}

// The pairs of outputs that a thread finishes: of `each` eights of filters, in two rows.
template <typename T>
class SplitOutputs {
 public:
  __device__ SplitOutputs(const ConvFprop& f, const ConvShape& shape, const ConvTiles& tiles,
                          int tile)
      : f_(f), each_(SplitMemory::kEights / cluster_size()) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    column_ = cluster_rank() * each_ * 8 + lane % 4 * 2;
    const int filter = tiles.filter(tile) + column_;
    left_ = shape.k - filter;
    for (int h = 0; h < 2; ++h) {
      const int pixel = tiles.pixel(tile) + row + 8 * h;
      has_[h] = row + 8 * h < tiles.rows(shape, tile);
      place_[h] = has_[h] ? f.grid(shape, pixel) * shape.k + filter : 0;
    }
    if (!f.beside) return;
    for_each([&](int j) {
      for (int h = 0; h < 2; ++h) {
        if (has_[h]) skip_[j][h] = load<2>(static_cast<const T*>(f.beside) + place_[h] + 8 * j);
      }
    });
  }

  // What was asked for above has come during the products.
  __device__ void finish(const SplitMemory& m) const {
    for_each([&](int j) {
      float4 sum = m.parts[j][threadIdx.x];
      for (int share = 1; share * each_ < SplitMemory::kEights; ++share) {
        const float4 part = m.parts[share * each_ + j][threadIdx.x];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      const float pairs[2][2] = {{sum.x, sum.y}, {sum.z, sum.w}};
      const float4 column = m.columns[column_ / 2 + 4 * j];
      for (int h = 0; h < 2; ++h) {
        if (!has_[h]) continue;
        store<2>(static_cast<T*>(f_.output) + place_[h] + 8 * j,
                 applied<T>(pairs[h], column, f_.beside, skip_[j][h], least_of(f_.epilogue.relu)));
      }
    });
  }

 private:
  template <typename F>
  __device__ void for_each(F f) const {
#pragma unroll
    for (int j = 0; j < SplitMemory::kEights; ++j) {
      if (j < each_ && 8 * j < left_) f(j);
    }
  }

  const ConvFprop& f_;
  int each_, column_;  // eights; the first filter, in the tile
  int left_;           // filters from there on, may be less than 1
  bool has_[2];
  int64_t place_[2];
  Pack<T, 2> skip_[SplitMemory::kEights][2] = {};
};

template <typename T>
__global__ void __launch_bounds__(kSplitThreads, SplitMemory::kBlocks)
    conv_split_sm90(const __grid_constant__ TensorMap input,
                    const __grid_constant__ TensorMap filter, const __grid_constant__ ConvFprop f,
                    const __grid_constant__ ConvShape shape, const ConvTiles tiles) {
#if defined(FASTRES_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(SplitMemory::kBlocks * (sizeof(SplitMemory) + 1024) <= 228 * 1024,
                "too much shared memory");
  SplitMemory& m = *reinterpret_cast<SplitMemory*>(dynamic_shared());
  const int tile = blockIdx.x / cluster_size();
  const auto steps = SplitSteps::of(shape, cluster_rank(), cluster_size());
  const bool multiplies = threadIdx.x < kSplitMultiply, produces = threadIdx.x == kSplitMultiply;
  if (produces) {
    init_ring<SplitMemory::kStages>(m.full, m.empty);
    barriers_ready();
    for_each_step(shape, steps, [&](const auto& at) {
      prefetch_3d(&filter, at.c, at.r * shape.s + at.s, tiles.filter(tile));
    });
  }
  cluster_sync();  // the barriers are there, and the blocks that parts are handed to
  wait_for_kernels_before();
  let_next_kernel_begin();
  if (produces)
    split_produce(m, input, filter, shape, steps, tiles.pixel(tile), tiles.filter(tile));
  if (multiplies) {
    const SplitOutputs<T> outputs(f, shape, tiles, tile);
    split_multiply<T>(m, f, shape, steps.last - steps.first, tiles.filter(tile));
    cluster_sync();
    outputs.finish(m);
  } else {
    cluster_sync();
  }
#else
  __trap();  // the host starts it on sm_90 only
#endif
}

// Launches one convolution whose shape fits_im2col() and has split_shares(): the host's code, free
// of torch.
template <typename T, typename Queue>
void conv_split_sm90_run(const Queue& queue, const ConvShape& shape, const ConvFprop& f,
                         int multiprocessors) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  const ConvTiles tiles = ConvTiles::of(shape, kSplitTileK);
  const int shares = split_shares(shape, multiprocessors);
  queue.launch(conv_split_sm90<T>,
               {tiles.count() * shares, kSplitThreads, sizeof(SplitMemory), shares, true},
               encode(input_map(f.input, kBfloat16, shape)),
               encode(filter_map(f.filter, kBfloat16, shape, kSplitTileK)), f, shape, tiles);
}

}  // namespace fastres::cuda
