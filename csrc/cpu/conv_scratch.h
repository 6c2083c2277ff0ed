// How much memory a job of the project's own convolutions packs things into.
#pragma once

#include "conv_grouped.h"
#include "conv_plan.h"

namespace fastres::cpu {

// For jobs of at most `rows` rows, with panels of `panel` output channels.
inline int64_t scratch_values(const ConvShape& shape, ConvAlgorithm algorithm, int64_t rows,
                              int64_t panel) {
  if (is_winograd(algorithm)) {
    const auto form = winograd_form(algorithm, shape.r);
    return form.positions() * (form.rows_stride(shape.c, rows) + rows * panel + kPositionSkew);
  }
  if (is_grouped(algorithm)) {
    const GroupedForm form(shape, panel / 2, channels_a_lane(algorithm));
    const PaddedPart part(shape, rows);
    return part.rows * part.columns * form.pixel() + kChunk;
  }
  const int64_t c = shape.c / channels_a_lane(algorithm);
  return (rows + kLines) * round_up(shape.taps() * c, kChunk) + kChunk;
}

}  // namespace fastres::cpu
