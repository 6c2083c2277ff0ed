// Runs the project's own convolutions on torch's threads.
#pragma once

#include "conv_plan.h"

namespace fastres::cpu {

// False where Winograd's sums were not finite: then the output is to be computed directly.
template <typename T>
bool run_conv(const ConvShape& shape, ConvAlgorithm algorithm, const ConvOperands<T>& operands);

// Output channels of a panel of packed filters.
int64_t conv_panel();

}  // namespace fastres::cpu
