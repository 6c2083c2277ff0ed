// The convolutions that the operators share: the project's kernels where they serve, else the
// vendor's.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "../conv_bn.h"
#include "conv_fprop.h"

namespace fastres::cuda {

// Whether the project's kernels compute this convolution, its gradient of the filters: 16-bit
// values, one group, whole packs of channels; the output on every GPU from sm_80 on, that gradient
// on one of compute capability 9.0 for which it was compiled. The rest, a stem's three channels and
// ResNeXt's groups with it, is the vendor's.
bool own_conv_serves(const at::Tensor& input, const at::Tensor& weight, const cpu::ConvGeometry& g);
bool own_wgrad_serves(const at::Tensor& input, const at::Tensor& weight,
                      const cpu::ConvGeometry& g);

// A batch norm of a convolution's input, by its statistics in training; a ReLU stands between them.
struct BatchNormBefore {
  const at::Tensor &mean, &invstd;
  const std::optional<at::Tensor>&weight, &bias;
};

// Its vectors in float32: kernels may read them as long as this lives. Null pointers where there is
// none.
class NormVectors {
 public:
  explicit NormVectors(const std::optional<BatchNormBefore>& bn);

  operator Vectors<float>() const;

 private:
  at::Tensor mean_, invstd_, weight_, bias_;
};

// relu(batch_norm(input)); input where there is none.
at::Tensor activated(const at::Tensor& input, const std::optional<BatchNormBefore>& bn);

// act(batch_norm(conv2d(input, weight)) + residual) by them, in eval.
at::Tensor own_conv(const at::Tensor& input, const at::Tensor& weight, const cpu::ConvGeometry& g,
                    const RunningBatchNorm& norm, const std::optional<at::Tensor>& residual,
                    bool relu);

// conv2d(input, weight) by them, and the moments of every filter's values: (K, segments) of
// Moments<float>; of activated(input, before), made in a pass or on the way in.
struct ConvMoments {
  at::Tensor output, moments;
  int64_t segments;
};
ConvMoments own_conv_moments(const at::Tensor& input, const at::Tensor& weight,
                             const cpu::ConvGeometry& g,
                             const std::optional<BatchNormBefore>& before = std::nullopt);

// The gradient of the filters by them, shaped as weight and in input's dtype; grad_output has the
// convolution's shape. With a batch norm before as above.
at::Tensor own_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                     const at::Tensor& weight, const cpu::ConvGeometry& g,
                     const std::optional<BatchNormBefore>& before = std::nullopt);

// The gradients of weight and bias, as many as are asked for, through conv2d(activated(input, bn),
// weight); by the project's kernels where they serve.
std::tuple<at::Tensor, at::Tensor> conv_wgrad_of(const at::Tensor& grad_output,
                                                 const at::Tensor& input, const at::Tensor& weight,
                                                 const cpu::ConvGeometry& g,
                                                 std::array<bool, 2> output_mask,
                                                 const std::optional<BatchNormBefore>& bn);

// Those of input, bn_weight and bn_bias, likewise.
std::tuple<at::Tensor, at::Tensor, at::Tensor> bn_relu_conv_dgrad(
    const at::Tensor& grad_output, const at::Tensor& input, const BatchNormBefore& bn,
    const at::Tensor& weight, const cpu::ConvGeometry& g, bool want_input, bool want_parameters);

// Throws where grad_output is not like the convolution's output.
void check_gradient(const at::Tensor& grad_output, const at::Tensor& input,
                    const at::Tensor& weight, const cpu::ConvGeometry& g);

// PyTorch's own, in the dtype of input.
at::Tensor vendor_conv(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, const cpu::ConvGeometry& g);

// The memory format in which PyTorch returns a convolution of these.
at::MemoryFormat conv_format(const at::Tensor& input, const at::Tensor& weight);

}  // namespace fastres::cuda
