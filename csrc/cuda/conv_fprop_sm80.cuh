// Convolution of 16-bit activations as an implicit matrix product for every GPU from sm_80 on, with
// the epilogues of conv_epilogue.cuh and, as its prologue, the batch norm and ReLU of the layer
// before.
//
// A block computes one tile of 128 pixels x kTileK filters. All its threads copy: the windows'
// values of 32 channels of one filter tap, and the filters', in a ring of stages. Its eight warps
// multiply, 32 pixels x half of the filters each. The epilogue uses the ring's memory.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_prologue.cuh"
#include "sm80.cuh"

namespace fastres::cuda {

constexpr int kPortableThreads = 256;

template <int kTileK>
struct PortableMemory {
  static constexpr int kStages = 4;
  static constexpr int kChunk = 32;  // input channels of a step: rows of 64 bytes
  static constexpr int kRowBytes = 2 * kChunk;

  struct Stage {
    char input[ConvTiles::kTileM * kRowBytes], filter[kTileK * kRowBytes];
  };
  union {
    Stage ring[kStages];
    char output[2][kHalfBytes<kTileK>];  // what lies beside it arrives there
  };
  float4 columns[kMostColumns];
  TileSums<kTileK> sums;
};

// A pack of 16 bytes of a row of 64: two rows share a line of memory, and eight rows' packs of the
// same columns lie in different banks.
__device__ inline char* pack_in(char* rows, int row, int pack) {
  return rows + row * 64 + (pack ^ (row >> 1 & 3)) * 16;
}

// What a thread copies: a pack of two rows of the input and of two, or one, of the filters.
template <typename T, int kTileK>
class PortableCopy {
 public:
  using M = PortableMemory<kTileK>;
  using Place = Step<M::kChunk>;

  __device__ PortableCopy(const ConvShape& shape, const ConvTiles& tiles, int tile,
                          const ConvFprop& f)
      : shape_(shape),
        input_(static_cast<const T*>(f.input)),
        filter_(static_cast<const T*>(f.filter)),
        filters_(tiles.filter(tile)),
        row_(threadIdx.x / 4),
        pack_(threadIdx.x % 4),
        windows_(shape, tiles.pixel(tile) + row_, 64) {}

  __device__ void operator()(typename M::Stage& stage, const Place& step) const {
    const int c = channel(step);
    for (int i = 0; i < 2; ++i) {
      const bool there = c < shape_.c && windows_.has(i, step.r, step.s);
      copy_later(pack_in(stage.input, row_ + 64 * i, pack_),
                 there ? input_ + windows_.pixel(i, step.r, step.s) * shape_.c + c : input_, there);
    }
    for (int i = 0; i < kTileK / 64; ++i) {
      const int64_t k = filters_ + row_ + 64 * i;
      const bool there = k < shape_.k && c < shape_.c;
      const int64_t tap = (k * shape_.r + step.r) * shape_.s + step.s;
      copy_later(pack_in(stage.filter, row_ + 64 * i, pack_),
                 there ? filter_ + tap * shape_.c + c : filter_, there);
    }
  }

  // The prologue, of what this thread copied. The copies must have arrived.
  __device__ void prepare(typename M::Stage& stage, const Place& step,
                          const Vectors<float>& vectors) const {
    const int c = channel(step);
    if (c >= shape_.c) return;
    normalise<T, 2>([&](int i) { return windows_.has(i, step.r, step.s); },
                    [&](int half) { return four_channels(vectors, c + 4 * half); },
                    [&](int i) { return pack_in(stage.input, row_ + 64 * i, pack_); });
  }

 private:
  __device__ int channel(const Place& step) const { return step.c + pack_ * 8; }

  const ConvShape& shape_;
  const T *input_, *filter_;
  int filters_, row_, pack_;
  Windows<2> windows_;
};

// A warp's products of one stage: rows [row, row + 32), columns [column, column + kTileK / 2).
template <typename T, int kTileK>
__device__ void multiply_stage(typename PortableMemory<kTileK>::Stage& stage,
                               float (&sum)[2][kTileK / 4], int row, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 16 of the 32 channels: two packs
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_matrices(a[i], pack_in(stage.input, row + 16 * i + lane % 16, 2 * half + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < kTileK / 32; ++j) {  // 16 filters at a time
      uint32_t b[4];
      load_matrices(b, pack_in(stage.filter, column + 16 * j + lane % 8 + lane / 16 * 8,
                               2 * half + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_add<T>(&sum[i][8 * j], a[i], b[0], b[1]);
        multiply_add<T>(&sum[i][8 * j + 4], a[i], b[2], b[3]);
      }
    }
  }
}

// The sums over taps and channels.
template <typename T, int kTileK, bool kPrologue>
__device__ void portable_sums(PortableMemory<kTileK>& m, float (&sum)[2][kTileK / 4],
                              const ConvShape& shape, const ConvTiles& tiles, int tile,
                              const ConvFprop& f, int row, int column) {
  using M = PortableMemory<kTileK>;
  const PortableCopy<T, kTileK> copy(shape, tiles, tile, f);
  const int steps = shape.r * shape.s * static_cast<int>(ceil_div(shape.c, M::kChunk));
  Step<M::kChunk> next, present;
  const auto fill = [&](int step) {
    if (step < steps) copy(m.ring[step % M::kStages], next);
    next.advance(shape);
    copies_commit();  // an empty group where there is nothing left: the count stays
  };
  for (int step = 0; step < M::kStages - 1; ++step) fill(step);
  for (int step = 0; step < steps; ++step) {
    auto& stage = m.ring[step % M::kStages];
    copies_wait<M::kStages - 2>();
    if constexpr (kPrologue) {
      copy.prepare(stage, present, f.prologue);
      present.advance(shape);
    }
    __syncthreads();  // the stage is there, and the one before it is done with
    fill(step + M::kStages - 1);
    multiply_stage<T, kTileK>(stage, sum, row, column);
  }
  copies_wait<0>();
  __syncthreads();  // the epilogue uses the ring's memory
}

template <typename T, int kTileK, Epilogue kEpilogue>
__device__ void portable_finish(PortableMemory<kTileK>& m, float (&sum)[2][kTileK / 4],
                                const ConvShape& shape, const ConvTiles& tiles, int tile,
                                const ConvFprop& f, int row, int column) {
  const int filter = tiles.filter(tile);
  const bool beside = f.beside != nullptr;
  const auto pixel = [&](int half) { return tiles.pixel(tile) + int64_t(half) * 64; };
  if (beside) {
    for (int half = 0; half < 2; ++half) {
      fetch_half<T, kTileK>(m.output[half], f.beside, shape, f.grid, pixel(half), filter,
                            threadIdx.x, kPortableThreads);
    }
  }
  if (const int i = threadIdx.x; i < kColumns<kEpilogue, kTileK>) {
    m.columns[i] = column_of<kEpilogue, kTileK>(f.epilogue, filter, shape.k, i);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Strip strip(row / 16 + i, column, tiles.rows(shape, tile), m.output[row / 64]);
    if constexpr (kEpilogue == Epilogue::kApply) {
      apply<T>(sum[i], m.columns, beside, f.epilogue.relu, strip);
    } else if constexpr (kEpilogue == Epilogue::kMoments) {
      put<T>(sum[i], strip);
    } else {
      mask<T>(sum[i], m.columns, strip, m.sums);
    }
  }
  __syncthreads();
  for (int half = 0; half < 2; ++half) {
    put_half<T, kTileK>(m.output[half], f.output, shape, f.grid, pixel(half), filter, threadIdx.x,
                        kPortableThreads);
  }
  if constexpr (kEpilogue == Epilogue::kMoments) {
    sum_moments<T, kTileK>(m.output, tiles.rows(shape, tile), m.sums, threadIdx.x);
    __syncthreads();
  }
  if constexpr (kEpilogue != Epilogue::kApply) {
    merge_sums<kEpilogue>(m.sums, f.epilogue, shape, tiles, tile, threadIdx.x);
  }
}

// Blocks of a multiprocessor: for two, the prologue would be a register short from sm_90 on, and
// spill it.
constexpr int portable_blocks([[maybe_unused]] bool prologue) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return prologue ? 1 : 2;
#else
  return 2;
#endif
}

template <typename T, int kTileK, Epilogue kEpilogue, bool kPrologue>
__global__ void __launch_bounds__(kPortableThreads, portable_blocks(kPrologue))
    conv_fprop_sm80(const __grid_constant__ ConvFprop f, const __grid_constant__ ConvShape shape,
                    const ConvTiles tiles) {
#if defined(FASTRES_EMULATOR) || __CUDA_ARCH__ >= 800
  using M = PortableMemory<kTileK>;
  static_assert(sizeof(M) <= 99 * 1024, "more shared memory than sm_86 has");
  M& m = *reinterpret_cast<M*>(dynamic_shared_memory());
  const int warp = threadIdx.x / 32, row = warp % 4 * 32, column = warp / 4 * (kTileK / 2);
  const int tile = blockIdx.x;
  float sum[2][kTileK / 4] = {};
  portable_sums<T, kTileK, kPrologue>(m, sum, shape, tiles, tile, f, row, column);
  portable_finish<T, kTileK, kEpilogue>(m, sum, shape, tiles, tile, f, row, column);
#else
  __trap();  // the host starts it on sm_80 and later only
#endif
}

// Launches one convolution whose shape fits_packs(): the host's code, free of torch.
template <typename T, Epilogue kEpilogue, bool kPrologue = false, typename Queue>
void conv_fprop_sm80_run(const Queue& queue, const ConvShape& shape, const ConvFprop& f,
                         int tile_k) {
  const ConvTiles tiles = ConvTiles::of(shape, tile_k);
  const auto launch = [&](auto tile) {
    constexpr int kTileK = decltype(tile)::value;
    queue.launch(conv_fprop_sm80<T, kTileK, kEpilogue, kPrologue>,
                 {tiles.count(), kPortableThreads, sizeof(PortableMemory<kTileK>)}, f, shape,
                 tiles);
  };
  if (tile_k == 128)
    launch(std::integral_constant<int, 128>());
  else
    launch(std::integral_constant<int, 64>());
}

}  // namespace fastres::cuda
