// What the tensor memory accelerator is told of an array: its fields, and the driver's encoding.
#pragma once

#include <cstdint>

#include "conv_plan.h"

#if !defined(FASTRES_EMULATOR)
#include <cuda.h>
#endif

namespace fastres::cuda {

// 16-bit values; dimensions from the innermost out. A tiled map loads boxes, an im2col map
// `pixels` windows' values of `box[0]` channels, wherever they are between the corners. Boxes are
// 128 bytes wide and swizzled by 128 bytes; what lies outside of the array reads as zero.
struct TensorMapFields {
  const void* address;
  bool bfloat16;
  int rank;
  uint64_t size[4];
  uint64_t stride[3];  // bytes, of all dimensions but the first
  uint32_t box[3];     // tiled
  bool im2col;
  int lower[2], upper[2];  // im2col: of w and h, where windows begin
  uint32_t pixels;
  uint32_t step[4];  // im2col: the convolution's strides
};

// The input (N, H, W, C), for `pixels` windows at a time.
inline TensorMapFields input_map(const void* x, bool bfloat16, const ConvShape& s,
                                 uint32_t pixels = ConvTiles::kTileM) {
  const auto c = static_cast<uint64_t>(s.c), w = static_cast<uint64_t>(s.w),
             h = static_cast<uint64_t>(s.h);
  TensorMapFields f{x,  bfloat16, 4, {c, w, h, static_cast<uint64_t>(s.n)}, {}, {}, true, {},
                    {}, pixels,   {}};
  f.stride[0] = 2 * c, f.stride[1] = 2 * c * w, f.stride[2] = 2 * c * w * h;
  f.box[0] = ConvTiles::kChunk;
  f.lower[0] = -s.padding.w, f.lower[1] = -s.padding.h;
  f.upper[0] = s.padding_end.w - s.reach_w();
  f.upper[1] = s.padding_end.h - s.reach_h();
  f.step[0] = f.step[3] = 1;
  f.step[1] = static_cast<uint32_t>(s.stride.w), f.step[2] = static_cast<uint32_t>(s.stride.h);
  return f;
}

// The filters (K, R * S, C), one tap of `tile_k` filters at a time.
inline TensorMapFields filter_map(const void* w, bool bfloat16, const ConvShape& s, int tile_k) {
  const auto c = static_cast<uint64_t>(s.c), taps = static_cast<uint64_t>(s.r) * s.s;
  return {w,
          bfloat16,
          3,
          {c, taps, static_cast<uint64_t>(s.k)},
          {2 * c, 2 * c * taps},
          {ConvTiles::kChunk, 1, static_cast<uint32_t>(tile_k)},
          false,
          {},
          {},
          0,
          {1, 1, 1, 1}};
}

// The output or the residual (pixels, K), 64 x 64 at a time.
inline TensorMapFields output_map(const void* y, bool bfloat16, const ConvShape& s) {
  const auto k = static_cast<uint64_t>(s.k);
  return {y,       bfloat16, 2,           {k, static_cast<uint64_t>(s.pixels())},
          {2 * k}, {64, 64}, false,       {},
          {},      0,        {1, 1, 1, 1}};
}

#if defined(FASTRES_EMULATOR)
using TensorMap = TensorMapFields;
inline TensorMap encode(const TensorMapFields& fields) { return fields; }
#else
using TensorMap = CUtensorMap;
// In tensor_map.cpp: throws c10::Error where the driver lacks the function or refuses the fields.
TensorMap encode(const TensorMapFields& fields);
#endif

}  // namespace fastres::cuda
