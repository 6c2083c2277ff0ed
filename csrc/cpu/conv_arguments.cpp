#include "conv_arguments.h"

#include <ATen/ops/as_strided.h>

#include "../checks.h"

namespace fastres::cpu {

Pair check_pair(at::IntArrayRef values, const char* name, int64_t least) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, name, ": expected 1 or 2 integers, got ",
              values);
  const Pair pair{values.front(), values.back()};
  TORCH_CHECK(pair[0] >= least && pair[1] >= least, name, ": expected values of at least ", least,
              ", got ", values);
  return pair;
}

ConvGeometry check_geometry(at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, int64_t groups) {
  return {check_pair(stride, "stride", 1), check_pair(padding, "padding", 0),
          check_pair(dilation, "dilation", 1), groups};
}

void check_parameter(const at::Tensor& t, const char* name, const at::Tensor& input) {
  check_tensor(t, name, input.device().type());
  TORCH_CHECK(t.device() == input.device(), name, ": expected the device of input, ",
              input.device(), ", got ", t.device());
  const auto dtype = input.scalar_type(), wide = accumulate_dtype(dtype);
  TORCH_CHECK(t.scalar_type() == dtype || t.scalar_type() == wide, name,
              ": expected the dtype of input, ", dtype, ", or ", wide, ", got ", t.scalar_type());
}

std::array<int64_t, 4> output_size(const at::Tensor& input, const at::Tensor& weight,
                                   const ConvGeometry& g) {
  std::array<int64_t, 4> size{input.size(0), weight.size(0), 0, 0};
  for (int d = 0; d < 2; ++d) {
    const int64_t padded = input.size(2 + d) + 2 * g.padding[d];
    const int64_t reach = g.dilation[d] * (weight.size(2 + d) - 1) + 1;
    TORCH_CHECK(weight.size(2 + d) > 0 && reach <= padded, "input: padded it measures ", padded,
                " in dimension ", 2 + d, ", less than the ", reach, " that weight of shape ",
                weight.sizes(), " reaches over");
    size[2 + d] = (padded - reach) / g.stride[d] + 1;
  }
  return size;
}

ConvGeometry geometry_of(const at::Tensor& input, const at::Tensor& weight, int64_t stride,
                         int64_t padding, int64_t dilation) {
  const int64_t groups = input.size(1) / weight.size(1);
  return {{stride, stride}, {padding, padding}, {dilation, dilation}, groups};
}

ConvShape shape_of(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& g) {
  const auto size = output_size(x, weight, g);
  return {x.size(0),      x.size(2),      x.size(3), x.size(1), weight.size(0),
          weight.size(2), weight.size(3), size[2],   size[3],   g.stride,
          g.padding,      g.dilation,     g.groups};
}

at::Tensor in_channels_last(const at::Tensor& t) {
  const auto dense = t.contiguous(at::MemoryFormat::ChannelsLast);
  if (output_format(dense) == at::MemoryFormat::ChannelsLast) return dense;
  const int64_t c = t.size(1), row = t.size(3) * c;
  return dense.as_strided(t.sizes(), {t.size(2) * row, 1, row, c});
}

bool follows_weights(const at::Tensor& weight, int64_t activations) {
  constexpr auto kLast = at::MemoryFormat::ChannelsLast;
  return weight.numel() > activations && output_format(weight) != kLast &&
         !weight.is_contiguous(kLast);
}

}  // namespace fastres::cpu
