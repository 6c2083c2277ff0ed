// Convolution weights with a batch normalisation folded in, packed for oneDNN, and kept between
// calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "../conv_bn.h"
#include "conv_plan.h"
#include "filter_samples.h"

namespace fastres::cpu {

struct FoldedConv {
  at::Tensor weight, bias;  // weight: dense in channels_last, or packed for an algorithm
  // Null where nothing is left to check. Else the caller does, on all its threads, for on one it
  // took a fiftieth of a ResNet-50's time at batch 1; where filters no longer match, it forgets the
  // entry and begins again.
  std::shared_ptr<const FilterSamples> unchecked;
};

// The folded weights of c, packed for the algorithm, from the cache where it has them.
//
// An entry is valid while the convolution's weight is the same storage at the same version and
// address, an element of every filter is unchanged (writing through `.data` leaves the version as
// it was), and every value of the bias and of BN's four vectors is unchanged. Whatever changed, the
// entry is dropped and made anew. oneDNN packs for one size of inputs: only when that comes a
// second time, for weights that are computed anew at each call; until then, and for kAten, weights
// are dense. Both give the same bits.
FoldedConv folded_conv(const ConvBn& c, at::IntArrayRef input_size, ConvAlgorithm algorithm);
void forget_folded(const ConvBn& c);

struct FoldCacheInfo {
  int64_t entries, bytes;
};

FoldCacheInfo fold_cache_info();
void clear_fold_cache();

}  // namespace fastres::cpu
