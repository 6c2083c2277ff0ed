// Convolution of 16-bit activations on sm_90a as an implicit matrix product, with an epilogue.
//
// A persistent block has three warpgroups. One thread of the first asks the tensor memory
// accelerator for tiles: of the input (im2col: 128 windows x 64 channels of one filter tap) and of
// the filters, in a ring of stages guarded by barriers, and of the residual. The other two multiply
// 64 of the rows each, apply the epilogue in registers, and hand the output back through shared
// memory. Narrow tiles are short work: two blocks share a multiprocessor then, and one multiplies
// while the other is in its epilogue. No atomics: two runs give the same bits.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_ring.cuh"

namespace fastres::cuda {

// Blocks of a multiprocessor, which share its registers and its memory.
constexpr int conv_blocks(int tile_k) { return tile_k == 64 ? 2 : 1; }

// Blocks of a cluster: those of a pair of tiles.
constexpr int conv_cluster(int tile_k) { return are_paired(tile_k) ? 2 : 1; }

template <int kTileK>
struct ConvMemory {
  static constexpr int kBlocks = conv_blocks(kTileK), kCluster = conv_cluster(kTileK);
  static constexpr int kStages = kTileK == 128 ? 5 : 3;
  static constexpr int kInputBytes = ConvTiles::kTileM * 128, kFilterBytes = kTileK * 128;

  alignas(1024) char input[kStages][kInputBytes];
  alignas(1024) char filter[kStages][kFilterBytes];
  alignas(
      1024) char output[2][kHalfBytes<kTileK>];  // on its way out; what lies beside arrives there
  float4 columns[2][kMostColumns];               // of the two groups
  TileSums<kTileK> sums;
  uint64_t full[kStages], empty[kStages], beside_full[2], beside_empty[2];
};

// The tensor maps of a call.
struct ConvMaps {
  TensorMap input, filter, output, beside;
};

// --- the producer ---

// A tile's filters of a step; in a cluster this block's part of them, for all of its blocks.
template <int kTileK>
__device__ void load_filters(char* to, const TensorMap& map, uint64_t* full, int c, int tap,
                             int filter) {
  if constexpr (ConvMemory<kTileK>::kCluster == 1) {
    load_3d(to, &map, full, c, tap, filter);
  } else {
    const int first = cluster_rank() * (kTileK / ConvMemory<kTileK>::kCluster);
    load_3d_everywhere(to + first * 128, &map, full, c, tap, filter + first);
  }
}

// What lies beside half a tile of an output without gaps.
template <int kTileK>
__device__ void load_beside(ConvMemory<kTileK>& m, const ConvMaps& maps, int half, int filter,
                            int pixel) {
  barrier_expect(&m.beside_full[half], kHalfBytes<kTileK>);
  for (int j = 0; j < kTileK / 64; ++j) {
    load_2d(m.output[half] + j * kBoxBytes, &maps.beside, &m.beside_full[half], filter + j * 64,
            pixel + half * 64);
  }
}

template <int kTileK>
__device__ void conv_produce(ConvMemory<kTileK>& m, const ConvMaps& maps, const ConvShape& shape,
                             const ConvTiles& tiles, bool beside) {
  using M = ConvMemory<kTileK>;
  Stage stage;
  int parity = 0;  // of the buffers
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const int pixel = tiles.pixel(tile), filter = tiles.filter(tile);
    const Window window = window_of(shape, pixel);
    for (int r = 0; r < shape.r; ++r) {
      for (int s = 0; s < shape.s; ++s) {
        for (int c = 0; c < shape.c; c += ConvTiles::kChunk) {
          const int i = stage.index;
          barrier_wait(&m.empty[i], stage.parity ^ 1);
          barrier_expect(&m.full[i], M::kInputBytes + M::kFilterBytes);
          load_im2col(m.input[i], &maps.input, &m.full[i], c, window, s * shape.dilation.w,
                      r * shape.dilation.h);
          load_filters<kTileK>(m.filter[i], maps.filter, &m.full[i], c, r * shape.s + s, filter);
          stage.advance<M::kStages>();
        }
      }
    }
    for (int half = 0; beside && half < 2; ++half) {
      barrier_wait(&m.beside_empty[half], parity ^ 1);
      load_beside(m, maps, half, filter, pixel);
    }
    parity ^= 1;
  }
}

// --- the consumers ---

// The prologue of a warpgroup's 64 rows of each stage of a tile.
template <typename T>
class Prologue {
 public:
  __device__ Prologue(const ConvShape& shape, const ConvTiles& tiles, int tile, int group,
                      const NormTable& table)
      : shape_(shape),
        table_(table),
        group_(group),
        windows_(shape, tiles.pixel(tile) + group * 64 + box_row(), 16) {}

  __device__ void operator()(char* box) {
    prepare_box<T>(
        box, shape_.c - step_.c, [&](int i) { return windows_.has(i, step_.r, step_.s); },
        [&](int c) { return table_(step_.c + c); }, group_);
    step_.advance(shape_);
  }

 private:
  const ConvShape& shape_;
  const NormTable& table_;
  int group_;
  Windows<4> windows_;
  Step<ConvTiles::kChunk> step_;
};

// The epilogue of a warpgroup's half of the tile, as far as shared memory. `column`: this thread's
// entry of the columns.
template <typename T, Epilogue kEpilogue, int kTileK>
__device__ void conv_finish(ConvMemory<kTileK>& m, const float (&sum)[kTileK / 2], int parity,
                            const ConvFprop& f, const ConvShape& shape, const ConvTiles& tiles,
                            int tile, int group, const float4& column) {
  const bool beside = f.beside != nullptr;
  const int thread = threadIdx.x % 128;
  char* half = m.output[group];
  if (thread < kColumns<kEpilogue, kTileK>) m.columns[group][thread] = column;
  if (beside && f.grid.dense) barrier_wait(&m.beside_full[group], parity);
  if (!beside && thread == 0) stores_wait_read();
  group_sync(1 + group, 128);  // the last tile has left the buffer
  if (beside && !f.grid.dense) {
    fetch_half<T, kTileK>(half, f.beside, shape, f.grid, tiles.pixel(tile) + group * 64,
                          tiles.filter(tile), thread, 128);
    group_sync(1 + group, 128);
  }
  const Strip strip(group * 4 + thread / 32, 0, tiles.rows(shape, tile), half);
  if constexpr (kEpilogue == Epilogue::kApply) {
    apply<T>(sum, m.columns[group], beside, f.epilogue.relu, strip);
  } else if constexpr (kEpilogue == Epilogue::kMoments) {
    put<T>(sum, strip);
  } else {
    mask<T>(sum, m.columns[group], strip, m.sums);
  }
}

// From shared memory to where it belongs; what lies outside of the output is left out.
template <typename T, int kTileK>
__device__ void conv_store(ConvMemory<kTileK>& m, const ConvMaps& maps, const ConvFprop& f,
                           const ConvShape& shape, const ConvTiles& tiles, int tile, int group) {
  char* half = m.output[group];
  const int pixel = tiles.pixel(tile) + group * 64, filter = tiles.filter(tile);
  fence_shared();
  group_sync(1 + group, 128);
  if (!f.grid.dense) {
    put_half<T, kTileK>(half, f.output, shape, f.grid, pixel, filter, threadIdx.x % 128, 128);
    return;
  }
  if (threadIdx.x % 128 != 0) return;
  for (int j = 0; j < kTileK / 64; ++j) {
    store_2d(&maps.output, half + j * kBoxBytes, filter + j * 64, pixel);
  }
  stores_commit();
  if (!f.beside) return;  // then the buffer is needed late in the next tile only
  stores_wait_read();
  barrier_arrive(&m.beside_empty[group]);
}

// Statistics of the whole tile, by both groups. Before it, both halves must be there.
template <typename T, Epilogue kEpilogue, int kTileK>
__device__ void conv_statistics(ConvMemory<kTileK>& m, const ConvEpilogue& e,
                                const ConvShape& shape, const ConvTiles& tiles, int tile) {
  const int thread = threadIdx.x - 128;
  group_sync(3, 256);
  if constexpr (kEpilogue == Epilogue::kMoments) {
    sum_moments<T, kTileK>(m.output, tiles.rows(shape, tile), m.sums, thread);
    group_sync(3, 256);
  }
  merge_sums<kEpilogue>(m.sums, e, shape, tiles, tile, thread);
  group_sync(3, 256);
}

template <typename T, Epilogue kEpilogue, bool kPrologue, int kTileK>
__device__ void conv_consume(ConvMemory<kTileK>& m, const ConvMaps& maps, const ConvFprop& f,
                             const ConvShape& shape, const ConvTiles& tiles) {
  const int group = threadIdx.x / 128 - 1, steps = steps_of(shape);
  Stage stage;
  int parity = 0;
  float sum[kTileK / 2];
  NormTable table(&m + 1, shape.c);
  if constexpr (kPrologue) {
    table.fill(f.prologue, 0, shape.c, threadIdx.x - 128, 256);
    group_sync(3, 256);
  }
  for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    // asked for before the products, needed after them
    const float4 column =
        column_of<kEpilogue, kTileK>(f.epilogue, tiles.filter(tile), shape.k, threadIdx.x % 128);
    const auto products = [&](auto prepare) {
      multiply<T, false, ConvMemory<kTileK>::kStages, ConvMemory<kTileK>::kCluster>(
          m.full, m.empty, sum, stage, steps, threadIdx.x % 32, prepare,
          [&](int i) { return operand<false>(m.input[i] + group * kBoxBytes); },
          [&](int i) { return operand<false>(m.filter[i]); });
    };
    if constexpr (kPrologue) {
      Prologue<T> prologue(shape, tiles, tile, group, table);
      products([&](int i) { prologue(m.input[i] + group * kBoxBytes); });
    } else {
      products([](int) {});
    }
    conv_finish<T, kEpilogue>(m, sum, parity, f, shape, tiles, tile, group, column);
    conv_store<T>(m, maps, f, shape, tiles, tile, group);
    if constexpr (kEpilogue != Epilogue::kApply) {
      conv_statistics<T, kEpilogue>(m, f.epilogue, shape, tiles, tile);
    }
    parity ^= 1;
  }
  if (threadIdx.x % 128 == 0) stores_wait();
}

template <typename T, int kTileK, Epilogue kEpilogue, bool kPrologue>
__global__ void __launch_bounds__(kConvThreads, ConvMemory<kTileK>::kBlocks)
    conv_fprop_sm90(const __grid_constant__ ConvMaps maps, const __grid_constant__ ConvFprop f,
                    const __grid_constant__ ConvShape shape, const ConvTiles tiles) {
#if defined(FASTRES_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using M = ConvMemory<kTileK>;
  // a block has a KB of the system's beside its own
  constexpr size_t kBytes = sizeof(M) + (kPrologue ? norm_bytes(kMostNormalised) : 0);
  static_assert(M::kBlocks * (kBytes + 1024) <= 228 * 1024, "too much shared memory");
  M& m = *reinterpret_cast<M*>(dynamic_shared());
  if (threadIdx.x == 0) {
    init_ring<M::kStages, M::kCluster>(m.full, m.empty);
    for (int i = 0; i < 2; ++i) {
      barrier_init(&m.beside_full[i], 1);
      barrier_init(&m.beside_empty[i], 1);
    }
    barriers_ready();
  }
  if constexpr (M::kCluster > 1)
    cluster_sync();
  else
    __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<M::kBlocks == 2 ? 32 : 56>();
    const bool beside = f.beside && f.grid.dense;  // else the consumers fetch it
    if (threadIdx.x == 0) conv_produce(m, maps, shape, tiles, beside);
  } else {
    take_registers<M::kBlocks == 2 ? 104 : 224>();
    conv_consume<T, kEpilogue, kPrologue>(m, maps, f, shape, tiles);
  }
  if constexpr (M::kCluster > 1) cluster_sync();  // the others write here until they are done
#else
  __trap();  // the host starts it on sm_90 only
#endif
}

// Launches one convolution whose shape fits_im2col(): the host's code, free of torch.
template <typename T, Epilogue kEpilogue, bool kPrologue = false, typename Queue>
void conv_fprop_sm90_run(const Queue& queue, const ConvShape& shape, const ConvFprop& f, int tile_k,
                         int multiprocessors) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  const int cluster = conv_cluster(tile_k);
  const ConvTiles tiles = ConvTiles::of(shape, tile_k, are_paired(tile_k));
  // Where there are gaps these are not used.
  const auto map = [&](const void* p) { return encode(output_map(p, kBfloat16, shape)); };
  ConvMaps maps{encode(input_map(f.input, kBfloat16, shape)),
                encode(filter_map(f.filter, kBfloat16, shape, tile_k / cluster)),
                map(f.output),
                {}};
  if (f.beside) maps.beside = map(f.beside);
  const int most = multiprocessors * conv_blocks(tile_k) / cluster * cluster;
  const int blocks = std::min(tiles.count(), std::max(most, cluster));
  const auto launch = [&](auto tile) {
    constexpr int kTileK = decltype(tile)::value;
    const size_t bytes = sizeof(ConvMemory<kTileK>) + (kPrologue ? norm_bytes(shape.c) : 0);
    queue.launch(conv_fprop_sm90<T, kTileK, kEpilogue, kPrologue>,
                 {blocks, kConvThreads, bytes, cluster}, maps, f, shape, tiles);
  };
  if constexpr (most_tile_k(kEpilogue, kPrologue) == 256) {
    if (tile_k == 256) return launch(std::integral_constant<int, 256>());
  }
  if (tile_k == 128)
    launch(std::integral_constant<int, 128>());
  else
    launch(std::integral_constant<int, 64>());
}

}  // namespace fastres::cuda
