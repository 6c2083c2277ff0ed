// How much memory a job of the project's own convolutions packs things into.
#pragma once

#include "conv_plan.h"

namespace fastres::cpu {

// For jobs of at most `rows` rows, with panels of `panel` output channels.
inline int64_t scratch_values(const ConvShape& shape, ConvAlgorithm algorithm, int64_t rows,
                              int64_t panel) {
  if (is_winograd(algorithm)) {
    const auto form = winograd_form(algorithm, shape.r);
    return form.positions() * (form.rows_stride(shape.c, rows) + rows * panel + kPositionSkew);
  }
  const int64_t c = algorithm == ConvAlgorithm::kDirectBf16 ? in_pairs(shape).c : shape.c;
  return (rows + 1) * round_up(shape.taps() * c, kChunk) + kChunk;
}

}  // namespace fastres::cpu
