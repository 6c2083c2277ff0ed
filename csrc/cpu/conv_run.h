// Runs the project's own convolutions on torch's threads.
#pragma once

#include <c10/util/FunctionRef.h>

#include "conv_plan.h"

namespace fastres::cpu {

// False where Winograd's sums were not finite: then the output is to be computed directly.
// `beside` is called by every thread for its part of [0, K), whatever there is to do for each
// filter.
template <typename T>
bool run_conv(
    const ConvShape& shape, ConvAlgorithm algorithm, const ConvOperands<T>& operands,
    c10::function_ref<void(Range)> beside = [](Range) {});

// Output channels of a panel of packed filters.
int64_t conv_panel();

}  // namespace fastres::cpu
