// How much memory a job of the project's own convolutions packs things into.
#pragma once

#include "conv_plan.h"

namespace fastres::cpu {

// For jobs of at most `rows` rows, with panels of `panel` output channels.
inline int64_t scratch_values(const ConvShape& shape, ConvAlgorithm algorithm, int64_t rows,
                              int64_t panel) {
  if (const int64_t m = winograd_tile(algorithm)) {
    const int64_t positions = WinogradGrid(shape, m).positions();
    return positions * (rows * (round_up(shape.c, kChunk) + panel) + 2 * kPositionSkew);
  }
  const int64_t c = algorithm == ConvAlgorithm::kDirectBf16 ? in_pairs(shape).c : shape.c;
  return (rows + 1) * round_up(shape.taps() * c, kChunk) + kChunk;
}

}  // namespace fastres::cpu
