// Winograd convolution at stride 2, phase by phase: F(4x4, 2x2) of 3x3 filters takes 81
// multiplications where the direct product takes 144, F(3x3, 4x4) of 7x7 filters 144 for 441.
#include "conv_plain_filters.h"
#include "conv_winograd.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// Where a tile begins in the input.
struct Origin {
  int64_t n, top, left;

  Origin(const ConvShape& shape, const Corner& corner)
      : n(corner.n), top(2 * corner.p - shape.padding[0]), left(2 * corner.q - shape.padding[1]) {}

  // Whether `side` pixels down and to the right there are no padding.
  bool is_inner(const ConvShape& shape, int64_t side) const {
    return top >= 0 && left >= 0 && top + side <= shape.h && left + side <= shape.w;
  }

  template <typename T>
  FASTRES_INLINE const T* pixel(const ConvShape& shape, const T* input, int64_t y,
                                int64_t x) const {
    return input + ((n * shape.h + top + y) * shape.w + left + x) * shape.c;
  }

  FASTRES_INLINE bool has(const ConvShape& shape, int64_t y, int64_t x) const {
    return top + y >= 0 && top + y < shape.h && left + x >= 0 && left + x < shape.w;
  }
};

// One phase of a tile of so many rows and columns, all its channels; `rows` are the tile's. Nothing
// of an odd phase is stored at the last row or column of positions, the only ones that the last
// pixels, of which it has one less, have a part in.
template <int height, int width, int m, int r, typename T>
void gather_phase(const ConvShape& shape, const T* input, const Origin& origin, int row_phase,
                  int column_phase, int64_t count, float* rows, int64_t position_stride) {
  constexpr int kIn = Tiling<m, r>::kIn;
  const int64_t chunks = ceil_div(shape.c, kChunk), size = chunks * count * kChunk;
  const bool inner = origin.is_inner(shape, 2 * kIn);
  for (int64_t c = 0; c < chunks * kChunk; c += kVec) {
    float* const out = rows + c / kChunk * count * kChunk + c % kChunk;
    const int64_t lanes = std::max(shape.c - c, int64_t{0});
    const auto store = [&](int y, int x, Vec value) FASTRES_INLINED {
      const int row = Tiling<height, r>::place(y), column = Tiling<width, r>::place(x);
      if (row + row_phase >= kIn || column + column_phase >= kIn) return;
      const int64_t columns = column + 1 < kIn ? 2 : 1;
      value.store(out + (row * kIn + column) * position_stride +
                  (row_phase * columns + column_phase) * size);
    };
    const auto at = [&](int y, int x) FASTRES_INLINED {
      return origin.pixel(shape, input, 2 * y + row_phase, 2 * x + column_phase) + c;
    };
    if (inner && lanes >= kVec) {
      transform_input<height, width, r>(
          [&](int y, int x) FASTRES_INLINED { return load_vec(at(y, x)); }, store);
    } else {
      transform_input<height, width, r>(
          [&](int y, int x) FASTRES_INLINED {
            const bool inside = origin.has(shape, 2 * y + row_phase, 2 * x + column_phase);
            return inside ? load_vec(at(y, x), lanes) : Vec(0.0f);
          },
          store);
    }
  }
}

// Two neighbours of one row, few channels each, zeros for padding. Writes whole vectors.
template <typename T>
FASTRES_INLINE void copy_pair(const ConvShape& shape, const T* input, const Origin& origin,
                              int64_t y, int64_t x, bool inner, float* to) {
  const T* const pixel = origin.pixel(shape, input, y, x);
  if (inner || (origin.has(shape, y, x) && origin.has(shape, y, x + 1))) {
    load_vec(pixel, 2 * shape.c).store(to);
    return;
  }
  (origin.has(shape, y, x) ? load_vec(pixel, shape.c) : Vec(0.0f)).store(to);
  (origin.has(shape, y, x + 1) ? load_vec(pixel + shape.c, shape.c) : Vec(0.0f))
      .store(to + shape.c);
}

// Few channels: a tile's phases side by side, [y][x][row's phase][column's phase][channel].
template <int height, int width, int m, int r, typename T>
void gather_shared(const ConvShape& shape, const T* input, const Origin& origin, float* rows,
                   int64_t position_stride) {
  constexpr int kIn = Tiling<m, r>::kIn;
  // Every vector reaches over the end of its values, and the next one covers that.
  alignas(64) float pixels[kIn * kIn * kChunk + 2 * kVec];
  const bool inner = origin.is_inner(shape, 2 * kIn);
  float* to = pixels;
  for (int y = 0; y < 2 * kIn; y += 2) {
    for (int x = 0; x < 2 * kIn; x += 2, to += kChunk) {
      if (kVec < kChunk) Vec(0.0f).store(to + kVec);
      copy_pair(shape, input, origin, y, x, inner, to);
      copy_pair(shape, input, origin, y + 1, x, inner, to + 2 * shape.c);
    }
  }
  for (int64_t c = 0; c < kChunk; c += kVec) {
    transform_input<height, width, r>(
        [&](int y, int x)
            FASTRES_INLINED { return Vec::loadu(pixels + (y * kIn + x) * kChunk + c); },
        [&](int y, int x, Vec value) FASTRES_INLINED {
          const int row = Tiling<height, r>::place(y), column = Tiling<width, r>::place(x);
          value.store(rows + c + (row * kIn + column) * position_stride);
        });
  }
}

template <int m, int r, typename T>
void gather_tiles(const ConvShape& shape, const T* input, const JobTiles& tiles, float* rows,
                  int64_t position_stride) {
  const int64_t count = tiles.count;
  const bool shared = WinogradForm{m, r, 2}.shares_chunk(shape.c);
  for (int64_t row = 0; row < count; ++row, rows += kChunk) {
    const Origin origin(shape, tiles.corners[row]);
    with_size<m, r>(tiles.corners[row].kind, [&]<int height, int width>() {
      if (shared) {
        gather_shared<height, width, m, r>(shape, input, origin, rows, position_stride);
        return;
      }
      for (int phase = 0; phase < 4; ++phase) {
        gather_phase<height, width, m, r>(shape, input, origin, phase / 2, phase % 2, count, rows,
                                          position_stride);
      }
    });
  }
}

template <int m, int r, typename Filters, typename T>
bool run_with(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
              float* scratch) {
  return run_winograd<m, r, 2, Filters>(
      shape, operands, job, scratch,
      [&](const JobTiles& tiles, float* rows, int64_t position_stride) {
        gather_tiles<m, r>(shape, operands.input, tiles, rows, position_stride);
      });
}

template <int m, int r, typename T>
bool run(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
         float* scratch) {
  return run_with<m, r, TransformedFilters<m, r, 2, T>>(shape, operands, job, scratch);
}

template <typename T>
bool run_plain(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
               float* scratch) {
  return run_with<4, 2, PlainFilters<4, 2, 2>>(shape, operands, job, scratch);
}

}  // namespace

template <typename T>
PolyphaseKernels<T> polyphase_kernels() {
  return {&run<4, 2, T>, &run_plain<T>, &run<3, 4, T>};
}

template PolyphaseKernels<float> polyphase_kernels<float>();
template PolyphaseKernels<c10::BFloat16> polyphase_kernels<c10::BFloat16>();
template PolyphaseKernels<c10::Half> polyphase_kernels<c10::Half>();

}  // namespace fastres::cpu::CPU_CAPABILITY
