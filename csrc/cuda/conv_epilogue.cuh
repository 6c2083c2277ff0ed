// What becomes of a convolution's sums, for every kernel whose warps hold them as the tensor cores
// leave them: of 16 rows (pixels) a thread has the rows lane / 4 + 8h and the columns (filters)
// 8j + lane % 4 * 2 + e, in sum[4j + 2h + e].
//
// A tile's 128 rows are staged in shared memory as halves of 64, on their way to the output, and so
// is what lies beside the output. No atomics: two runs give the same bits.
#pragma once

#include "bn_relu_walk.cuh"
#include "conv_box.cuh"
#include "conv_fprop.h"

namespace fastres::cuda {

// Room for half a tile: boxes side by side.
template <int kTileK>
constexpr int kHalfBytes = kTileK / 64 * kBoxBytes;

// What a thread of the epilogue has to know of its columns, in shared memory before it begins.
// kApply, of a pair of filters: folded_pair(). kMask, of one: mean, scale and shift of the batch
// norm behind.
constexpr int kMostColumns = 128;

template <Epilogue kEpilogue, int kTileK>
constexpr int kColumns = kEpilogue == Epilogue::kApply  ? kTileK / 2
                         : kEpilogue == Epilogue::kMask ? kTileK
                                                        : 0;

// Batch norm, and the convolution's bias before it, as a scale and a shift of filter k.
__device__ inline float2 folded(const RunningBatchNorm& bn, int k) {
  const auto of = [&](const float* vector, float otherwise) {
    return vector ? vector[k] : otherwise;
  };
  const float scale = bn.var ? of(bn.weight, 1) / sqrtf(bn.var[k] + bn.eps) : 1;
  return {scale, fmaf(of(bn.conv_bias, 0) - of(bn.mean, 0), scale, of(bn.bias, 0))};
}

// Of a pair of filters: scale, scale, shift, shift.
__device__ inline float4 folded_pair(const RunningBatchNorm& bn, int k) {
  const float2 left = folded(bn, k), right = folded(bn, k + 1);
  return {left.x, right.x, left.y, right.y};
}

// Entry `i` for the tile that begins with `filter`, of `filters`: from global memory.
template <Epilogue kEpilogue, int kTileK>
__device__ float4 column_of(const ConvEpilogue& e, int filter, int filters, int i) {
  const int k = filter + (kEpilogue == Epilogue::kApply ? 2 * i : i);
  if (i >= kColumns<kEpilogue, kTileK> || k >= filters) return {};
  if constexpr (kEpilogue == Epilogue::kApply) return folded_pair(e.norm, k);
  const Coefficients<float> behind = coefficients(e.behind, k);
  return {behind.mean, behind.scale, behind.shift, 0};
}

// Sums of parts of a tile's rows: of kMoments about its first row, the pivot, of kMask of g and of
// g * (x - mean). A tile of 256 filters, which is never masked, has two parts at most.
template <int kTileK>
struct TileSums {
  static constexpr int kParts = kTileK == 256 ? 2 : 8;

  float first[kParts][kTileK], second[kParts][kTileK], pivot[kTileK];
};

// A warp's 16 rows of the tile, from `column` on, and where they lie in shared memory.
class Strip {
 public:
  __device__ Strip(int number, int column, int rows_of_tile, char* half)
      : number(number),
        column_(column),
        lane_(threadIdx.x % 32),
        rows_(rows_of_tile - number * 16) {
    turn_ = lane_ / 4 ^ column / 8 % 8;
    place_ = half + column / 64 * kBoxBytes + (number % 4 * 16 + lane_ / 4) * 128 + lane_ % 4 * 4;
  }

  const int number;

  // Whether row lane / 4 + 8h exists.
  __device__ bool has(int h) const { return lane_ / 4 + 8 * h < rows_; }

  // This thread's pair of columns 8j + lane % 4 * 2 in that row: place_in(), cheap in a loop. The
  // columns of a strip are one box's, or whole boxes.
  template <typename T>
  __device__ T* at(int j, int h) const {
    return reinterpret_cast<T*>(place_ + j / 8 * kBoxBytes + h * 1024 + ((j % 8 ^ turn_) << 4));
  }

  // The first of that pair, in the tile.
  __device__ int column(int j) const { return column_ + 8 * j + lane_ % 4 * 2; }

  // Sums over the strip's rows. A thread keeps half of its columns, adds what its partner has of
  // them and gives away the others, three times: it ends with N / 8 of N columns.
  template <int N>
  __device__ void sum_rows(float (&value)[N]) const {
    keep_half<N / 2>(value, 16);
    keep_half<N / 4>(value, 8);
    keep_half<N / 8>(value, 4);
  }

  // Writes what sum_rows() left.
  template <int N>
  __device__ void put_sums(const float (&value)[N], float* to) const {
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const int kept = lane_ / 4 * (N / 8) + i;
      to[column(kept / 2) + kept % 2] = value[i];
    }
  }

 private:
  template <int HALF, int N>
  __device__ void keep_half(float (&value)[N], int lanes) const {
    const bool upper = lane_ & lanes;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
      const float low = value[i], high = value[i + HALF];
      value[i] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, lanes);
    }
  }

  int column_, lane_, rows_;  // may be less than 0, or more than 16
  int turn_;
  char* place_;
};

// max(x, least); NaN stays.
__device__ inline float at_least(float x, float least) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(least));
  return x;
#else
  return x < least ? least : x;
#endif
}

// kApply, of a pair of filters: their sums, what a column says of them, what lies beside.
template <typename T>
__device__ Pack<T, 2> applied(const float* sum, const float4& column, bool residual,
                              const Pack<T, 2>& skip, float least) {
  float left = fmaf(sum[0], column.x, column.z), right = fmaf(sum[1], column.y, column.w);
  if (residual) {
    left += widen(skip.value[0]);
    right += widen(skip.value[1]);
  }
  Pack<T, 2> y;
  narrow(at_least(left, least), y.value[0]);
  narrow(at_least(right, least), y.value[1]);
  return y;
}

// The least that ReLU leaves, if there is one.
__device__ inline float least_of(bool relu) { return relu ? 0 : -INFINITY; }

// kApply, of a strip: to where the residual, if there is one, lies already.
template <typename T, int HALF>
__device__ void apply(const float (&sum)[HALF], const float4* columns, bool residual, bool relu,
                      const Strip& s) {
  const float least = least_of(relu);
#pragma unroll
  for (int j = 0; j < HALF / 4; ++j) {
    const float4 column = columns[s.column(j) / 2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* place = s.at<T>(j, h);
      const auto skip = residual ? load<2>(place) : Pack<T, 2>{};
      store<2>(place, applied<T>(&sum[4 * j + 2 * h], column, residual, skip, least));
    }
  }
}

// kMoments, of a strip.
template <typename T, int HALF>
__device__ void put(const float (&sum)[HALF], const Strip& s) {
#pragma unroll
  for (int j = 0; j < HALF / 4; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Pack<T, 2> y;
      narrow(sum[4 * j + 2 * h], y.value[0]);
      narrow(sum[4 * j + 2 * h + 1], y.value[1]);
      store<2>(s.at<T>(j, h), y);
    }
  }
}

// Then, of the tile's `rows`, by 256 threads: each sums up some rows of a pair of columns, about
// the tile's first row. Since that is one of the n rows, n * (mean - pivot)^2 is at most n times
// the squares: little cancels, see bn_relu.cuh.
template <typename T, int kTileK>
__device__ void sum_moments(char (&output)[2][kHalfBytes<kTileK>], int rows, TileSums<kTileK>& sums,
                            int thread) {
  constexpr int kPairs = kTileK / 2, kRows = kTileK / 4;  // of a part
  const int column = thread % kPairs * 2, part = thread / kPairs;
  const auto pivot = load<2>(reinterpret_cast<const T*>(place_in(output[0], 0, column)));
  float about[2] = {widen(pivot.value[0]), widen(pivot.value[1])};
  for (float& a : about) a = fabsf(a) < INFINITY ? a : 0;  // else y - a would be NaN
  float sum[2] = {}, squares[2] = {};
  char* half = output[part * kRows / 64] + part * kRows % 64 * 128;
  const auto add = [&](int row) {
    const auto y = load<2>(reinterpret_cast<const T*>(place_in(half, row, column)));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float distance = widen(y.value[i]) - about[i];
      sum[i] += distance;
      squares[i] = fmaf(distance, distance, squares[i]);
    }
  };
  const int left = rows - part * kRows, end = left < kRows ? left : kRows;
  int row = 0;
  for (; row + 8 <= end; row += 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) add(row + i);
  }
  for (; row < end; ++row) add(row);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    sums.first[part][column + i] = sum[i];
    sums.second[part][column + i] = squares[i];
    if (part == 0) sums.pivot[column + i] = about[i];
  }
}

// kMask, of a strip: x lies where the result goes. The mask is forward's, to the bit: of what batch
// norm gave, rounded.
template <typename T, int HALF, int kTileK>
__device__ void mask(const float (&sum)[HALF], const float4* columns, const Strip& s,
                     TileSums<kTileK>& sums) {
  float sum_g[HALF / 2], sum_gx[HALF / 2];
#pragma unroll
  for (int j = 0; j < HALF / 4; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) sum_g[2 * j + i] = sum_gx[2 * j + i] = 0;
    const float4 k[2] = {columns[s.column(j)], columns[s.column(j) + 1]};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto x = load<2>(s.at<T>(j, h));
      Pack<T, 2> y;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Coefficients<float> behind{k[i].x, k[i].y, k[i].z};
        narrow(behind(widen(x.value[i])), y.value[i]);
        // where y is NaN it passes
        const float g = widen(y.value[i]) <= 0 ? 0 : sum[4 * j + 2 * h + i];
        if (s.has(h)) {
          sum_g[2 * j + i] += g;
          sum_gx[2 * j + i] = fmaf(g, widen(x.value[i]) - behind.mean, sum_gx[2 * j + i]);
        }
        narrow(g, y.value[i]);
      }
      store<2>(s.at<T>(j, h), y);
    }
  }
  s.sum_rows(sum_g);
  s.put_sums(sum_g, sums.first[s.number]);
  s.sum_rows(sum_gx);
  s.put_sums(sum_gx, sums.second[s.number]);
}

// The sums over a tile's parts, the filters shared out among 256 threads. Before it, all parts must
// be there.
template <Epilogue kEpilogue, int kTileK>
__device__ void merge_sums(const TileSums<kTileK>& sums, const ConvEpilogue& e,
                           const ConvShape& shape, const ConvTiles& tiles, int tile, int thread) {
  constexpr int kParts = kEpilogue == Epilogue::kMoments ? 512 / kTileK : 8;
  const int filter = tiles.filter(tile) + thread;
  const int rows = tiles.rows(shape, tile);
  if (thread >= kTileK || filter >= shape.k || rows == 0) return;
  float first = 0, second = 0;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    first += sums.first[part][thread];
    second += sums.second[part][thread];
  }
  const int64_t to = int64_t(filter) * e.segments + e.first + tiles.row(tile);
  if constexpr (kEpilogue == Epilogue::kMask) {
    e.sums[to] = {first, second};
  } else {
    const float count = rows, around = second - first * first / count;
    e.moments[to] = {count, sums.pivot[thread], first, around < 0 ? 0 : around};  // NaN stays
  }
}

// f(place, offset) for the packs of 16 bytes of half a tile that exist: where each lies in shared
// memory and in its array, among `threads`.
template <int kTileK, typename F>
__device__ void for_each_pack(char* half, const ConvShape& shape, const PixelGrid& grid,
                              int64_t pixel, int filter, int thread, int threads, F f) {
  constexpr int kPacks = kTileK / 8;
  for (int i = thread; i < 64 * kPacks; i += threads) {
    const int row = i / kPacks, column = i % kPacks * 8;
    if (pixel + row >= shape.pixels() || filter + column >= shape.k) continue;
    f(place_in(half, row, column), grid(shape, pixel + row) * shape.k + filter + column);
  }
}

// Half a tile from its array into shared memory, or back.
template <typename T, int kTileK>
__device__ void fetch_half(char* half, const void* from, const ConvShape& shape,
                           const PixelGrid& grid, int64_t pixel, int filter, int thread,
                           int threads) {
  for_each_pack<kTileK>(
      half, shape, grid, pixel, filter, thread, threads, [&](char* place, int64_t offset) {
        *reinterpret_cast<Pack<T>*>(place) = load<8>(static_cast<const T*>(from) + offset);
      });
}

template <typename T, int kTileK>
__device__ void put_half(char* half, void* to, const ConvShape& shape, const PixelGrid& grid,
                         int64_t pixel, int filter, int thread, int threads) {
  for_each_pack<kTileK>(
      half, shape, grid, pixel, filter, thread, threads, [&](char* place, int64_t offset) {
        store<8>(static_cast<T*>(to) + offset, load<8>(reinterpret_cast<const T*>(place)));
      });
}

}  // namespace fastres::cuda
