// The fused operators, differentiable: each is called through the dispatcher, so that dispatch
// modes, profilers and overrides see it, and recorded where autograd asks for a gradient. What is
// saved, and what backward does with it, is documented in fastres/autograd.py, which serves
// wherever this does not.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <optional>

#include "cpu/conv_arguments.h"
#include "cpu/max_pool.h"

namespace fastres {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments of F.conv2d and F.batch_norm behind their inputs.
struct Convolution {
  at::Tensor weight;
  OptionalTensor bias;
  cpu::ConvGeometry geometry;
};

struct BatchNorm {
  OptionalTensor running_mean, running_var, weight, bias;
  bool training;
  double momentum, eps;
};

inline bool asks_for_gradient(const at::Tensor& t) { return t.requires_grad(); }
inline bool asks_for_gradient(const OptionalTensor& t) { return t && t->requires_grad(); }

// Whether a call on these tensors must be recorded.
template <typename... Tensors>
bool needs_graph(const Tensors&... tensors) {
  return c10::GradMode::is_enabled() && (asks_for_gradient(tensors) || ...);
}

namespace autograd {

// relu(input + residual)
at::Tensor add_relu(const at::Tensor& input, const at::Tensor& residual);

// act(batch_norm(input) + residual)
at::Tensor bn_relu(const at::Tensor& input, const OptionalTensor& residual, const BatchNorm& bn,
                   bool relu);

at::Tensor conv(const at::Tensor& input, const Convolution& conv);

// act(batch_norm(conv(input)) + residual) in eval; never recorded.
at::Tensor conv_bn_relu(const at::Tensor& input, const OptionalTensor& residual,
                        const Convolution& conv, const BatchNorm& bn, bool relu);

// The same in the residual's place.
at::Tensor conv_bn_relu_(const at::Tensor& input, const at::Tensor& residual,
                         const Convolution& conv, const BatchNorm& bn, bool relu);

// max_pool2d(conv_bn_relu(input), pool); never recorded.
at::Tensor conv_bn_relu_pool(const at::Tensor& input, const Convolution& conv, const BatchNorm& bn,
                             const cpu::MaxPool& pool);

// linear(mean(input, {2, 3}), weight, bias); never recorded.
at::Tensor mean_linear(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias);

}  // namespace autograd
}  // namespace fastres
