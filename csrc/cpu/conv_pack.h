// Filters as the project's own convolutions read them: [panel][...][channel][panel's outputs], the
// last panel and the last chunk of input channels filled with zeros.
//   direct: [K / panel][(R * S * C) rounded up to 16][panel]
//   direct_bf16: likewise, of words that hold two neighbouring channels in bfloat16
//   grouped, grouped_bf16: see conv_grouped.h
//   F(m, r): [K / panel][(m + r - 1)^2][C rounded up to 16][panel], G g G^T of every filter g; at
//   stride 2 the channels of all phases, see WinogradForm
//   plain: [K / panel][half a panel][C rounded up to 16][tap][its outputs], the taps scaled
#pragma once

#include <ATen/core/Tensor.h>

#include "conv_plan.h"

namespace fastres::cpu {

// fp32 filters in any memory format.
FilterView filters_of(const at::Tensor& weight, int64_t groups = 1);

// What the gradient of the input is convolved with, at stride 1: filters turned by 180 degrees,
// input and output channels of every group exchanged.
FilterView turned(FilterView filters);

int64_t packed_values(const FilterView& filters, ConvAlgorithm algorithm);

// Into `out`, of packed_values(), on torch's threads.
void pack_filters(const FilterView& filters, ConvAlgorithm algorithm, float* out);

}  // namespace fastres::cpu
