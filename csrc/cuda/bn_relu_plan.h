// How kernels of bn_relu walk over an activation: plain C++, for the host, the device and the
// tests.
//
// Channels lie either side by side (channels_last: `outer` pixels, a row of channels each) or in
// planes (`outer` images, a plane of `inner` pixels for each channel). A block serves some channels
// and a segment of their values: neighbouring threads neighbouring packs of values, `across` of
// them, and `down` rows or images at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pack.cuh"

namespace fastres::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Values of a channel: outer x inner. Channels side by side: N * H * W x 1; planes: N x H * W.
struct Activation {
  int64_t outer, inner, channels;
  bool side_by_side;

  static Activation of(int64_t n, int64_t c, int64_t pixels, bool channels_last) {
    if (c == 1) return {1, n * pixels, 1, false};  // one plane, whatever the strides say
    if (channels_last || pixels == 1) return {n * pixels, 1, c, true};
    return {n, pixels, c, false};
  }

  int64_t count() const { return outer * inner; }  // values of a channel
  // Neighbouring values in memory that a pack must not reach beyond.
  int64_t run() const { return side_by_side ? channels : inner; }
};

// Threads of a block, as many as kThreads; powers of 2.
struct Tile {
  int across, down;
};

inline Tile tile_for(const Activation& a, int pack) {
  // Eight packs of 16 bytes are a line of memory. Planes are walked along: the longer the better.
  const int most = !a.side_by_side ? kThreads : pack > 1 ? 8 : 32;
  int across = 1;
  while (across < most && across * pack < a.run()) across *= 2;
  return {across, kThreads / across};
}

// Of one block: rows or images [top, bottom) and packs of a plane [left, right).
struct Segment {
  int64_t top, bottom, left, right;
};

// The values of a channel, cut into rectangles of `rows` x `packs`, `wide` of them side by side.
// Numbers of blocks fit into 32 bits: a launch has no more.
struct Cut {
  Activation activation;
  Tile tile;
  int64_t length, rows, packs;  // length: packs of a plane, 1 where channels are side by side
  uint32_t channel_blocks, wide, segments;

  int64_t blocks() const { return int64_t(channel_blocks) * segments; }

  __host__ __device__ Segment segment(uint32_t i) const {
    const int64_t top = i / wide * rows, left = i % wide * packs;
    const int64_t bottom = top + rows, right = left + packs;
    return {top, bottom < activation.outer ? bottom : activation.outer, left,
            right < length ? right : length};
  }
};

// Segments of at least `steps` packs a thread, `most` of them for each block of channels.
inline Cut cut_for(const Activation& a, int pack, int64_t steps, int64_t most) {
  const auto part = [](int64_t length, int64_t least, int64_t parts) {
    return std::max(least, ceil_div(ceil_div(length, parts), least) * least);
  };
  const Tile tile = tile_for(a, pack);
  int64_t length = 1, rows, packs = 1, channel_blocks = a.channels;
  if (a.side_by_side) {
    rows = part(a.outer, tile.down * steps, most);
    channel_blocks = ceil_div(a.channels, tile.across * pack);
  } else {
    length = a.inner / pack;
    // Images first, so that planes stay whole; then along the plane.
    const int64_t along = std::min(ceil_div(length, tile.across), steps);
    rows = part(a.outer, tile.down * ceil_div(steps, along), most);
    packs = part(length, tile.across * along, std::max<int64_t>(most / ceil_div(a.outer, rows), 1));
  }
  const int64_t wide = ceil_div(length, packs), segments = ceil_div(a.outer, rows) * wide;
  return {
      a, tile, length, rows, packs, uint32_t(channel_blocks), uint32_t(wide), uint32_t(segments)};
}

constexpr int64_t kBlocks = 4;  // wanted for every multiprocessor

// Of a kernel that treats every value on its own: as many steps as still leave enough blocks, for
// the channels' vectors are read once a block.
inline Cut cut_to_apply(const Activation& a, int pack, int multiprocessors) {
  for (int64_t steps = 8;; steps /= 2) {
    const Cut cut = cut_for(a, pack, steps, INT64_MAX / 2);
    if (steps == 1 || cut.blocks() >= kBlocks * multiprocessors) return cut;
  }
}

// Of a reduction: some blocks for every multiprocessor, whatever the shape.
inline Cut cut_to_reduce(const Activation& a, int pack, int multiprocessors) {
  constexpr int64_t kSteps = 4;
  const Cut whole = cut_for(a, pack, kSteps, 1);
  return cut_for(a, pack, kSteps,
                 std::max<int64_t>(1, ceil_div(kBlocks * multiprocessors, whole.channel_blocks)));
}

}  // namespace fastres::cuda
