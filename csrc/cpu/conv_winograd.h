// What Winograd's convolutions have in common: tiles of the input, transformed by the caller, are
// multiplied position by position, and the sums of one panel of channels transformed back while
// they are in the cache. Included by *_kernel.cpp only.
#pragma once

#include "conv_kernels.h"
#include "conv_tile.h"
#include "winograd.h"

namespace fastres::cpu::CPU_CAPABILITY {

template <int m, int r>
struct Tiling {
  static constexpr int kIn = m + r - 1;
  static constexpr int64_t kPositions = kIn * kIn;

  // Where the i-th point stands among those of the form that it belongs to.
  static constexpr int place(int i) {
    if constexpr (requires { Winograd<m, r>::kPlaces; }) {
      return Winograd<m, r>::kPlaces[i];
    } else {
      return i;
    }
  }
};

// Tiles of m x m, and those that are a row or a column shorter, or both: in this order those that
// have a position in common are neighbours, see JobTiles::having.
enum TileKind { kFlat, kWhole, kNarrow, kSmall, kKinds };

// f<rows, columns>() with the size of such a tile.
template <int m, int r, typename F>
FASTRES_INLINE void with_size(TileKind kind, const F& f) {
  if constexpr (WinogradForm{m, r, 1}.mixes()) {
    if (kind == kFlat) return f.template operator()<m - 1, m>();
    if (kind == kNarrow) return f.template operator()<m, m - 1>();
    if (kind == kSmall) return f.template operator()<m - 1, m - 1>();
  }
  f.template operator()<m, m>();
}

// The tile's corner in the output.
struct Corner {
  int64_t n, p, q;
  TileKind kind;

  Corner() = default;
  Corner(const WinogradGrid& grid, int64_t tile) {
    const int64_t row = tile / grid.columns.count, column = tile % grid.columns.count;
    const int64_t row_of_image = row % grid.rows.count;
    n = row / grid.rows.count;
    p = grid.rows.begin(row_of_image);
    q = grid.columns.begin(column);
    const bool narrow = grid.columns.is_shorter(column);
    kind = grid.rows.is_shorter(row_of_image) ? (narrow ? kSmall : kFlat)
                                              : (narrow ? kNarrow : kWhole);
  }
};

// A job's tiles in the order of their kinds.
struct JobTiles {
  int64_t count = 0;
  int64_t ends[kKinds];
  Corner corners[kMostTiles];

  JobTiles(const WinogradGrid& grid, Range tiles) {
    Corner all[kMostTiles];
    for (int64_t i = 0; i < tiles.size(); ++i) all[i] = Corner(grid, tiles.begin + i);
    for (int kind = 0; kind < kKinds; ++kind) {
      for (int64_t i = 0; i < tiles.size(); ++i) {
        if (all[i].kind == kind) corners[count++] = all[i];
      }
      ends[kind] = count;
    }
  }

  // Those that have a position, which is missing from tiles of fewer rows, of fewer columns.
  Range having(bool all_rows, bool all_columns) const {
    return {all_rows ? ends[kFlat] : 0,
            all_columns ? ends[kWhole] : (all_rows ? ends[kNarrow] : ends[kSmall])};
  }
};

// A tile of NHWC maps, of which some pixels may lie beyond the borders: those are zeros. The
// strides are copied, for the compiler reads members of a shape again after everything that is
// written.
template <int rows, int columns, typename T>
class TilePixels {
 public:
  // Of h x w pixels of c channels; (top, left) is the corner in the n-th.
  TilePixels(const T* maps, int64_t n, int64_t h, int64_t w, int64_t c, int64_t top, int64_t left)
      : origin_(maps + ((n * h + top) * w + left) * c), row_(w * c), column_(c) {
    for (int y = 0; y < rows; ++y) {
      for (int x = 0; x < columns; ++x) {
        const bool inside = top + y >= 0 && top + y < h && left + x >= 0 && left + x < w;
        inside_ |= uint64_t{inside} << (y * columns + x);
      }
    }
  }

  // transform(load), where load(y, x) gives the vector of channels from c on.
  template <typename Transform>
  FASTRES_INLINE void load(int64_t c, const Transform& transform) const {
    constexpr uint64_t kAll = (uint64_t{1} << rows * columns) - 1;
    const T* const first = origin_ + c;
    const int64_t row = row_, column = column_, lanes = std::max(column - c, int64_t{0});
    if (inside_ == kAll && lanes >= kVec) {
      transform([&](int y, int x)
                    FASTRES_INLINED { return load_vec(first + y * row + x * column); });
    } else {
      const uint64_t inside = inside_;
      transform([&](int y, int x) FASTRES_INLINED {
        return inside >> (y * columns + x) & 1 ? load_vec(first + y * row + x * column, lanes)
                                               : Vec(0.0f);
      });
    }
  }

 private:
  const T* origin_;
  int64_t row_, column_;
  uint64_t inside_ = 0;  // a bit for every pixel
};

// What a tile of so many rows and columns of the output is computed from, at stride 1.
template <int rows, int columns, int r, typename T>
TilePixels<rows + r - 1, columns + r - 1, T> input_tile(const ConvShape& shape, const T* input,
                                                        const Corner& corner) {
  return {input,
          corner.n,
          shape.h,
          shape.w,
          shape.c,
          corner.p - shape.padding[0],
          corner.q - shape.padding[1]};
}

// B^T d B of one vector of channels, for a tile of so many rows and columns: load(y, x) gives the
// tile's values, store(y, x, value) gets the transform's.
template <int rows, int columns, int r, typename Load, typename Store>
FASTRES_INLINE void transform_input(const Load& load, const Store& store) {
  constexpr int kHeight = rows + r - 1, kWidth = columns + r - 1;
  Vec half[kHeight][kWidth];
#pragma GCC unroll 6
  for (int x = 0; x < kWidth; ++x) {
    Vec d[kHeight], t[kHeight];
#pragma GCC unroll 6
    for (int y = 0; y < kHeight; ++y) d[y] = load(y, x);
    Winograd<rows, r>::input(d, t);
#pragma GCC unroll 6
    for (int y = 0; y < kHeight; ++y) half[y][x] = t[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kHeight; ++y) {
    Vec t[kWidth];
    Winograd<columns, r>::input(half[y], t);
#pragma GCC unroll 6
    for (int x = 0; x < kWidth; ++x) store(y, x, t[x]);
  }
}

// A^T t A of one vector of channels: load(y, x) gives the sums, store(y, x, value) gets the tile's
// values.
template <int rows, int columns, int r, typename Load, typename Store>
FASTRES_INLINE void transform_output(const Load& load, const Store& store) {
  constexpr int kHeight = rows + r - 1, kWidth = columns + r - 1;
  Vec half[rows][kWidth];
#pragma GCC unroll 6
  for (int x = 0; x < kWidth; ++x) {
    Vec t[kHeight], y[rows];
#pragma GCC unroll 6
    for (int i = 0; i < kHeight; ++i) t[i] = load(i, x);
    Winograd<rows, r>::output(t, y);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) half[i][x] = y[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < rows; ++i) {
    Vec y[columns];
    Winograd<columns, r>::output(half[i], y);
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) store(i, j, y[j]);
  }
}

// What the coming tiles need of the input and those before them do not, by and large.
template <typename T>
Prefetch prefetch_tiles(const ConvShape& shape, const WinogradGrid& grid, const T* input,
                        Range coming, int64_t steps) {
  const Corner corner(grid, coming.begin);
  const int64_t size = shape.n * shape.h * shape.w;
  const int64_t y = corner.p * shape.stride[0] - shape.padding[0] + 2;
  const int64_t first = (corner.n * shape.h + y) * shape.w + corner.q * shape.stride[1];
  const int64_t m = grid.rows.m;
  const int64_t pixels = coming.size() * m * m * shape.stride[0] * shape.stride[1];
  const auto at = [&](int64_t pixel) {
    return input + std::clamp(pixel, int64_t{0}, size) * shape.c;
  };
  return {at(first), at(first + pixels), steps};
}

// Where the sums of a position go. Meanwhile what the transforms back will read and write is
// fetched: at each position one pixel of every tile, at the last ones nothing.
template <typename T, bool kBothHalves>
struct ToSums {
  static constexpr bool kBoth = kBothHalves;

  float* sums;
  const int64_t* corners;  // of the tiles in the output; null for nothing
  T* output;               // a tile's pixel, counted from its corner
  const T* residual;       // as the output, may be null

  ToSums from(int64_t row) const {
    return {sums + row * kPanel, corners == nullptr ? nullptr : corners + row, output, residual};
  }

  ToSums next_panel() const { return *this; }

  FASTRES_INLINE void prefetch(int64_t row) const {
    if (corners == nullptr) return;
    prefetch_panel<true>(output + corners[row]);
    if (residual != nullptr) prefetch_panel<false>(residual + corners[row]);
  }

  FASTRES_INLINE void operator()(int64_t row, Vec left, Vec right) const {
    left.store(sums + row * kPanel);
    if constexpr (kBoth) right.store(sums + row * kPanel + kVec);
  }
};

alignas(64) inline constexpr float kZeros[kPanel] = {};

// A tile's sums of one panel, transformed back. `checked` becomes NaN with the first Inf or NaN.
template <int rows, int columns, int m, int r, typename T>
FASTRES_INLINE void finish_tile(const ConvShape& shape, const ConvOperands<T>& operands,
                                const Finish<T>& finish, const Corner& corner, int64_t channel,
                                const Start& bias, const float* sums, int64_t position_stride,
                                Vec& checked) {
  constexpr int kIn = Tiling<m, r>::kIn;
  const int64_t first = ((corner.n * shape.p + corner.p) * shape.q + corner.q) * shape.k + channel;
  const int64_t height = std::min<int64_t>(rows, shape.p - corner.p);
  const int64_t width = std::min<int64_t>(columns, shape.q - corner.q);
  for (int64_t lane = 0; lane < std::min(kPanel, shape.k - channel); lane += kVec) {
    const int64_t lanes = std::min(kVec, shape.k - channel - lane);
    const Vec shift = Vec::loadu(bias.value + lane);
    transform_output<rows, columns, r>(
        [&](int y, int x) FASTRES_INLINED {
          const int position = Tiling<rows, r>::place(y) * kIn + Tiling<columns, r>::place(x);
          return Vec::loadu(sums + lane + position * position_stride);
        },
        [&](int y, int x, Vec sum) FASTRES_INLINED {
          if (y >= height || x >= width) return;
          checked = at::vec::fmadd(sum, Vec(0.0f), checked);
          const int64_t to = first + lane + (y * shape.q + x) * shape.k;
          const Vec scale(Winograd<rows, r>::kScale[y] * Winograd<columns, r>::kScale[x]);
          store_vec(finish(at::vec::fmadd(sum, scale, shift), to, lanes), operands.output + to,
                    lanes);
        });
  }
}

// False where a sum is not finite.
template <int m, int r, typename T>
bool finish_tiles(const ConvShape& shape, const ConvOperands<T>& operands, const JobTiles& tiles,
                  int64_t channel, const float* sums, int64_t position_stride) {
  const auto finish = finish_of(operands);
  const Start bias(operands.bias, channel, shape.k);
  Vec checked(0.0f);
  for (int64_t row = 0; row < tiles.count; ++row) {
    const auto& corner = tiles.corners[row];
    with_size<m, r>(corner.kind, [&]<int rows, int columns>() FASTRES_INLINED {
      finish_tile<rows, columns, m, r>(shape, operands, finish, corner, channel, bias,
                                       sums + row * kPanel, position_stride, checked);
    });
  }
  return (checked == checked).zero_mask() == 0;
}

// A job's transformed tiles, [position][chunk][tile][16], and the sums of one panel of channels,
// [position][tile][kPanel]: in values from one position to the next.
struct Positions {
  float *rows, *sums;
  int64_t rows_stride, sums_stride;
};

// The products of a panel at all positions, with filters that were transformed when they were
// packed.
template <int m, int r, int stride, typename T>
class TransformedFilters {
 public:
  TransformedFilters(const ConvShape& shape, const ConvOperands<T>& operands,
                     const WinogradGrid& grid, const JobTiles& tiles, const ConvJob& job)
      : shape_(shape), operands_(operands), tiles_(tiles) {
    coming_ = prefetch_tiles(shape, grid, operands.input, job.coming,
                             job.panels.size() * tiles_of(tiles.count) * kForm.chunks(shape.c));
    for (int64_t row = 0; row < tiles.count; ++row) {
      const Corner& at = tiles.corners[row];
      corners_[row] = ((at.n * shape.p + at.p) * shape.q + at.q) * shape.k;
    }
  }

  void multiply(int64_t panel, const Positions& at) {
    const bool both = shape_.k - panel * kPanel > kVec;
    both ? multiply_halves<true>(panel, at) : multiply_halves<false>(panel, at);
  }

 private:
  static constexpr WinogradForm kForm{m, r, stride};

  template <bool kBoth>
  void multiply_halves(int64_t panel, const Positions& at) {
    constexpr int kIn = Tiling<m, r>::kIn;
    const float* weight = operands_.weight + panel * kForm.depth(shape_.c) * kPanel;
    for (int position = 0; position < kIn * kIn; ++position) {
      constexpr int kMissing = kForm.mixes() ? kIn - 2 : kIn;
      const auto having = tiles_.having(position / kIn == kMissing, position % kIn == kMissing);
      const Panels in{at.rows + position * at.rows_stride + having.begin * kChunk,
                      tiles_.count * kChunk,
                      weight,
                      kForm.chunks(shape_.c, position),
                      kZeros,
                      kForm.chunk_depth(shape_.c)};
      const int64_t pixel = (position / m * shape_.q + position % m) * shape_.k + panel * kPanel;
      const T* const residual =
          operands_.residual == nullptr ? nullptr : operands_.residual + pixel;
      const ToSums<T, kBoth> to{at.sums + position * at.sums_stride + having.begin * kPanel,
                                position < m * m ? corners_ + having.begin : nullptr,
                                operands_.output + pixel, residual};
      multiply_panel(having.size(), in, coming_, to);
      weight += in.weights();
    }
  }

  const ConvShape& shape_;
  const ConvOperands<T>& operands_;
  const JobTiles& tiles_;
  Prefetch coming_;
  // A tile of rows may reach over the end by less than its height.
  int64_t corners_[kMostTiles + kTileRows] = {};
};

// gather(tiles, rows, position_stride) transforms the tiles of the input. Filters is a class as the
// one above.
template <int m, int r, int stride, typename Filters, typename T, typename Gather>
bool run_winograd(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
                  float* scratch, const Gather& gather) {
  constexpr WinogradForm kForm{m, r, stride};
  const WinogradGrid grid(shape, kForm);
  const JobTiles tiles(grid, job.rows);
  const int64_t rows_stride = kForm.rows_stride(shape.c, tiles.count);
  const Positions at{scratch, scratch + Tiling<m, r>::kPositions * rows_stride, rows_stride,
                     tiles.count * kPanel + kPositionSkew};
  gather(tiles, at.rows, at.rows_stride);
  Filters filters(shape, operands, grid, tiles, job);
  bool finite = true;
  for (int64_t panel = job.panels.begin; panel < job.panels.end; ++panel) {
    filters.multiply(panel, at);
    finite &= finish_tiles<m, r>(shape, operands, tiles, panel * kPanel, at.sums, at.sums_stride);
  }
  return finite;
}

}  // namespace fastres::cpu::CPU_CAPABILITY
