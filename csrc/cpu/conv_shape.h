// What the project's own convolutions are given: one group, NHWC activations.
#pragma once

#include <array>
#include <cstdint>

namespace fastres::cpu {

using Pair = std::array<int64_t, 2>;

// (N, H, W, C) activations, (K, C, R, S) filters, (N, P, Q, K) output.
struct ConvShape {
  int64_t n, h, w, c;
  int64_t k, r, s;
  int64_t p, q;
  Pair stride, padding, dilation;

  int64_t pixels() const { return n * p * q; }
  int64_t taps() const { return r * s; }
};

// The same convolution with two neighbouring channels of bfloat16 in the place of one of float32.
inline ConvShape in_pairs(ConvShape shape) {
  shape.c /= 2;
  return shape;
}

// Chunks of 16 channels, a cache line of fp32, are what activations are packed in.
constexpr int64_t kChunk = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Kept free between the positions of a Winograd tile, which at multiples of 4 KB would all fall
// into one set of the cache.
constexpr int64_t kPositionSkew = 5 * kChunk;

// Output tiles of F(m x m, 3 x 3), and the positions of the product in the transformed domain.
struct WinogradGrid {
  int64_t m, rows, columns;

  WinogradGrid(const ConvShape& shape, int64_t m)
      : m(m), rows(ceil_div(shape.p, m)), columns(ceil_div(shape.q, m)) {}

  int64_t positions() const { return (m + 2) * (m + 2); }
  int64_t tiles(const ConvShape& shape) const { return shape.n * rows * columns; }
};

// [begin, end)
struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

// (K, C, R, S) filters anywhere in memory: in elements from one to the next. Where input and output
// channels are exchanged and the taps run backwards, they are those of the input's gradient.
struct FilterView {
  const float* data;
  int64_t k, c, r, s;
  int64_t k_stride, c_stride, r_stride, s_stride;
};

// y = act(conv(x) + bias + residual); `bias` and `residual` may be null.
template <typename T>
struct ConvOperands {
  const T* input;
  const float* weight;  // packed, see conv_pack.h
  const float* bias;    // K values
  const T* residual;    // as the output
  T* output;
  bool relu;
};

}  // namespace fastres::cpu
