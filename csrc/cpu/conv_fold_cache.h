// Convolution weights with a batch normalisation folded in, packed for oneDNN, and kept between
// calls.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>

namespace fastres::cpu {

using Pair = std::array<int64_t, 2>;

struct ConvGeometry {
  Pair stride, padding, dilation;
  int64_t groups;

  bool operator==(const ConvGeometry&) const = default;
};

// y = BN_running(conv2d(x, weight, bias)), computed in `dtype`.
struct ConvBn {
  const at::Tensor& weight;
  const std::optional<at::Tensor>& bias;
  const at::Tensor &running_mean, &running_var;
  const std::optional<at::Tensor>&bn_weight, &bn_bias;
  ConvGeometry geometry;
  double eps;
  at::ScalarType dtype;
};

struct FoldedConv {
  at::Tensor weight, bias;  // weight: dense in channels_last, or packed; both give the same bits
};

// The folded weights of c for inputs of this size, from the cache where it has them.
//
// An entry is valid while the convolution's weight is the same storage at the same version and
// address, an element of every filter is unchanged (writing through `.data` leaves the version as
// it was), and every value of the bias and of BN's four vectors is unchanged. Whatever changed, the
// entry is dropped and made anew. A size is packed, where asked for, when it comes a
// second time: weights that are computed anew for each call are never packed.
FoldedConv folded_conv(const ConvBn& c, at::IntArrayRef input_size, bool packed);

struct FoldCacheInfo {
  int64_t entries, bytes;
};

FoldCacheInfo fold_cache_info();
void clear_fold_cache();

}  // namespace fastres::cpu
