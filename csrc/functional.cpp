#include "functional.h"

#include <ATen/autocast_mode.h>

#include "arguments.h"
#include "cpu/operators.h"

namespace fastres {
namespace {

namespace py = pybind11;

BatchNorm batch_norm_of(py::handle running_mean, py::handle running_var, py::handle weight,
                        py::handle bias, py::handle training, py::handle momentum, py::handle eps) {
  return {optional_tensor_of(running_mean.ptr()),
          optional_tensor_of(running_var.ptr()),
          optional_tensor_of(weight.ptr()),
          optional_tensor_of(bias.ptr()),
          bool_of(training.ptr()),
          double_of(momentum.ptr()),
          double_of(eps.ptr())};
}

// Of other dtypes PyTorch's own convolution is recorded.
at::Tensor convolve(const at::Tensor& input, const Convolution& conv) {
  const auto dtype = input.scalar_type();
  require(dtype == at::kFloat || dtype == at::kBFloat16);
  require(conv.weight.scalar_type() == dtype);
  require(!conv.bias || conv.bias->scalar_type() == dtype);
  return autograd::conv(input, conv);
}

// PyTorch's autocast keeps the copy of a weight for as long as it is on.
at::Tensor autocast_and_convolve(const at::Tensor& input, const Convolution& conv) {
  const auto cast = [dtype = at::autocast::get_autocast_dtype(at::kCPU)](const at::Tensor& t) {
    return at::autocast::cached_cast(dtype, t, at::kCPU);
  };
  Convolution narrow = conv;
  narrow.weight = cast(conv.weight);
  if (conv.bias) narrow.bias = cast(*conv.bias);
  return convolve(cast(input), narrow);
}

}  // namespace

at::Tensor conv(const at::Tensor& input, const Convolution& conv) {
  return at::autocast::is_autocast_enabled(at::kCPU) ? autocast_and_convolve(input, conv)
                                                     : convolve(input, conv);
}

at::Tensor conv_bn_relu(const at::Tensor& input, const OptionalTensor& residual,
                        const Convolution& conv, const BatchNorm& bn, bool relu, bool reuse) {
  const bool autocast = at::autocast::is_autocast_enabled(at::kCPU);
  const auto dtype = input.scalar_type();
  require(conv.weight.dim() == 4);
  if (bn.training || needs_graph(input, residual, conv.weight, conv.bias, bn.weight, bn.bias)) {
    return autograd::bn_relu(fastres::conv(input, conv), residual, bn, relu);
  }
  require(!autocast && bn.running_mean && bn.running_var && conv.weight.scalar_type() == dtype);
  require(!conv.bias || conv.bias->scalar_type() == dtype);
  if (reuse && cpu::is_faster_in_place(input, *residual, conv.weight, conv.geometry)) {
    return autograd::conv_bn_relu_(input, *residual, conv, bn, relu);
  }
  return autograd::conv_bn_relu(input, residual, conv, bn, relu);
}

namespace functional {

py::object add_relu(py::handle input, py::handle residual) {
  return unless_unusual([&] {
    const auto& x = activation_of(input.ptr());
    const auto& r = tensor_of(residual.ptr());
    const py::gil_scoped_release no_gil;
    return autograd::add_relu(x, r);
  });
}

py::object bn_relu(py::handle input, py::handle residual, py::handle running_mean,
                   py::handle running_var, py::handle weight, py::handle bias, py::handle training,
                   py::handle momentum, py::handle eps, bool relu) {
  return unless_unusual([&] {
    const auto& x = activation_of(input.ptr());
    const auto r = optional_tensor_of(residual.ptr());
    const auto bn = batch_norm_of(running_mean, running_var, weight, bias, training, momentum, eps);
    const py::gil_scoped_release no_gil;
    return autograd::bn_relu(x, r, bn, relu);
  });
}

py::object conv_bn_relu(py::handle input, py::handle residual, py::handle weight, py::handle bias,
                        py::handle stride, py::handle padding, py::handle dilation,
                        py::handle groups, py::handle running_mean, py::handle running_var,
                        py::handle bn_weight, py::handle bn_bias, py::handle training,
                        py::handle momentum, py::handle eps, bool relu) {
  return unless_unusual([&] {
    const auto& x = activation_of(input.ptr());
    const auto r = optional_tensor_of(residual.ptr());
    const Convolution conv{tensor_of(weight.ptr()),
                           optional_tensor_of(bias.ptr()),
                           {pair_of(stride.ptr()), pair_of(padding.ptr()), pair_of(dilation.ptr()),
                            int_of(groups.ptr())}};
    const auto bn =
        batch_norm_of(running_mean, running_var, bn_weight, bn_bias, training, momentum, eps);
    const py::gil_scoped_release no_gil;
    return fastres::conv_bn_relu(x, r, conv, bn, relu);
  });
}

}  // namespace functional
}  // namespace fastres
