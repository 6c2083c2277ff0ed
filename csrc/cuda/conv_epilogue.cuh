// What becomes of a convolution's sums, for every kernel whose warps hold them as the tensor cores
// leave them: of 16 rows (pixels) a thread has the rows lane / 4 + 8h and the columns (filters)
// 8j + lane % 4 * 2 + e, in sum[4j + 2h + e].
//
// A tile's 128 rows are staged in shared memory as halves of 64, on their way to the output, and so
// is what lies beside the output. No atomics: two runs give the same bits.
#pragma once

#include "bn_relu_walk.cuh"
#include "conv_fprop.h"

namespace fastres::cuda {

// Room for half a tile: boxes of 64 x 64 values, whose rows of 128 bytes are swizzled.
template <int kTileK>
constexpr int kHalfBytes = 64 * kTileK * 2;

__device__ inline char* place_in(char* half, int row, int column) {
  return half + column / 64 * 8192 + row * 128 + (column % 64 * 2 ^ (row & 7) << 4);
}

// Statistics of a tile's strips of 16 rows: means and sums of squares, or sums of g and g * x.
template <int kTileK>
struct StripSums {
  float first[8][kTileK], second[8][kTileK];
};

// A warp's 16 rows.
struct Strip {
  int number;  // in the tile
  int column;  // the first, in the tile
  int filter;  // that column's
  int rows;    // that exist
  int lane;

  __device__ Strip(const ConvShape& shape, const ConvTiles& tiles, int tile, int number, int column)
      : number(number),
        column(column),
        filter(tiles.filter(tile) + column),
        lane(threadIdx.x % 32) {
    const int64_t left = shape.pixels() - tiles.pixel(tile) - number * 16;
    rows = left < 0 ? 0 : left < 16 ? static_cast<int>(left) : 16;
  }

  __device__ bool has(int h) const { return lane / 4 + 8 * h < rows; }
  __device__ int row(int h) const { return number % 4 * 16 + lane / 4 + 8 * h; }  // in its half
};

// The sum over a strip's rows of what each of its threads has of a column.
__device__ inline float over_rows(float value) {
#pragma unroll
  for (int lanes = 4; lanes < 32; lanes *= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

__device__ inline float2 pair_of(const float* vector, int k, int filters, float otherwise) {
  if (vector == nullptr || k >= filters) return {otherwise, otherwise};
  return *reinterpret_cast<const float2*>(vector + k);
}

// Moments of a strip: about their own mean, so nothing cancels.
template <int HALF>
__device__ void strip_moments(const float (&y)[HALF], float* mean, float* squares, const Strip& s) {
#pragma unroll
  for (int j = 0; j < HALF / 2; ++j) {
    const float top = y[j / 2 * 4 + j % 2], bottom = y[j / 2 * 4 + j % 2 + 2];
    const float sum = over_rows((s.has(0) ? top : 0) + (s.has(1) ? bottom : 0));
    const float centre = sum / float(s.rows > 0 ? s.rows : 1);
    const float a = s.has(0) ? top - centre : 0, b = s.has(1) ? bottom - centre : 0;
    const float square = over_rows(a * a + b * b);
    const int column = s.column + j / 2 * 8 + s.lane % 4 * 2 + j % 2;
    if (s.lane < 4) mean[column] = centre, squares[column] = square;
  }
}

// g and g * (x - mean) of two rows of a column, summed over the strip.
__device__ inline void strip_sums(const float (&g)[2], const float (&gx)[2], float* sums_g,
                                  float* sums_gx, int column, const Strip& s) {
  const float sum_g = over_rows((s.has(0) ? g[0] : 0) + (s.has(1) ? g[1] : 0));
  const float sum_gx = over_rows((s.has(0) ? gx[0] : 0) + (s.has(1) ? gx[1] : 0));
  if (s.lane < 4) sums_g[column] = sum_g, sums_gx[column] = sum_gx;
}

// kApply and kMoments, of a strip: from its sums to the half of the tile where the residual, if
// there is one, lies already.
template <typename T, Epilogue kEpilogue, int HALF, int kTileK>
__device__ void apply(float (&sum)[HALF], const ConvEpilogue& e, bool residual, const Strip& s,
                      int filters, char* half, StripSums<kTileK>& strips) {
#pragma unroll
  for (int j = 0; j < HALF / 4; ++j) {
    const int offset = 8 * j + s.lane % 4 * 2, k = s.filter + offset;
    float2 scale = {1, 1}, shift = {0, 0};
    if (kEpilogue == Epilogue::kApply) {
      scale = pair_of(e.scale, k, filters, 1);
      shift = pair_of(e.shift, k, filters, 0);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float &left = sum[4 * j + 2 * h], &right = sum[4 * j + 2 * h + 1];
      T* at = reinterpret_cast<T*>(place_in(half, s.row(h), s.column + offset));
      if (kEpilogue == Epilogue::kApply) {
        left = fmaf(left, scale.x, shift.x);
        right = fmaf(right, scale.y, shift.y);
        if (residual) {
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
    strip_moments(sum, strips.first[s.number], strips.second[s.number], s);
  }
}

// kMask, of a strip: x lies where the result goes. The mask is forward's, to the bit: of what batch
// norm gave, rounded.
template <typename T, int HALF, int kTileK>
__device__ void mask(float (&sum)[HALF], const ConvEpilogue& e, const Strip& s, int filters,
                     char* half, StripSums<kTileK>& strips) {
#pragma unroll
  for (int j = 0; j < HALF / 4; ++j) {
    const int offset = 8 * j + s.lane % 4 * 2, column = s.column + offset, k = s.filter + offset;
    Coefficients<float> behind[2] = {};
    for (int i = 0; i < 2 && k < filters; ++i) behind[i] = coefficients(e.behind, k + i);
    float g[2][2], gx[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      T* at = reinterpret_cast<T*>(place_in(half, s.row(h), column));
      const auto x = load<2>(at);
      Pack<T, 2> y;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        narrow(behind[i](widen(x.value[i])), y.value[i]);
        g[i][h] = widen(y.value[i]) <= 0 ? 0 : sum[4 * j + 2 * h + i];  // where y is NaN it passes
        gx[i][h] = g[i][h] * (widen(x.value[i]) - behind[i].mean);
        narrow(g[i][h], y.value[i]);
      }
      store<2>(at, y);
    }
    for (int i = 0; i < 2; ++i) {
      strip_sums(g[i], gx[i], strips.first[s.number], strips.second[s.number], column + i, s);
    }
  }
}

// Merges the eight strips of a tile, the filters shared out among 256 threads. Before it, all
// strips must be there.
template <Epilogue kEpilogue, int kTileK>
__device__ void merge_strips(const StripSums<kTileK>& strips, const ConvEpilogue& e,
                             const ConvShape& shape, const ConvTiles& tiles, int tile, int thread) {
  const int64_t left = shape.pixels() - tiles.pixel(tile);
  const int rows = left < ConvTiles::kTileM ? static_cast<int>(left) : ConvTiles::kTileM;
  for (int k = thread; k < kTileK; k += 256) {
    const int filter = tiles.filter(tile) + k;
    if (filter >= shape.k) break;
    const int64_t to = int64_t(filter) * e.segments + e.first + tile / tiles.across;
    float count = 0, first = 0, second = 0;  // of kMoments: mean and squares
    for (int strip = 0; strip < 8 && strip * 16 < rows; ++strip) {
      const float a = strips.first[strip][k], b = strips.second[strip][k];
      if (kEpilogue == Epilogue::kMask) {
        first += a;
        second += b;
        continue;
      }
      const float n = rows - strip * 16 < 16 ? rows - strip * 16 : 16;
      const float delta = a - first, share = n / (count + n);
      second += b + delta * delta * count * share;
      first += delta * share;
      count += n;
    }
    if constexpr (kEpilogue == Epilogue::kMask)
      e.sums[to] = {first, second};
    else
      e.moments[to] = {count, first, 0, second};
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
