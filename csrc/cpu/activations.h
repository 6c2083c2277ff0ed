// What the operators and their kernels agree on about activations in memory.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace fastres::cpu {

// Accumulation type: fp64 for fp64, fp32 for everything narrower.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Kernels read per-channel vectors in whole vector registers: they are padded by this many values.
constexpr int64_t kChannelPadding = 64;

}  // namespace fastres::cpu
