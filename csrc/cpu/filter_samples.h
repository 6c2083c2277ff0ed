// A look at a convolution's weight that tells whether somebody wrote to it unseen.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "conv_shape.h"

namespace fastres::cpu {

// One element of every filter, for filters are what is pruned and swapped through `.data`, which
// leaves a tensor's version as it was. Of a dense weight.
class FilterSamples {
 public:
  explicit FilterSamples(const at::Tensor& weight);

  // Whether these filters of a weight of the same shape, strides and dtype still have them.
  bool match(const at::Tensor& weight, Range filters) const;

  bool match(const at::Tensor& weight) const { return match(weight, {0, weight.size(0)}); }

  int64_t bytes() const { return static_cast<int64_t>(values_.size()); }

 private:
  std::vector<char> values_;
};

}  // namespace fastres::cpu
