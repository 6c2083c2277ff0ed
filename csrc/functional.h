// The calls of fastres/functional.py on the CPU, for the case that needs no second thought: read,
// served and recorded here, in a fraction of the time that Python takes for it. None is returned
// for anything out of the ordinary, and then nothing has happened.
#pragma once

#include <pybind11/pybind11.h>

#include "autograd.h"

namespace fastres {

// act(batch_norm(conv(input)) + residual): folded in eval where there is nothing to record, else in
// two steps, under autocast as F.conv2d. Throws Unusual.
at::Tensor conv_bn_relu(const at::Tensor& input, const OptionalTensor& residual,
                        const Convolution& conv, const BatchNorm& bn, bool relu,
                        bool reuse = false);

// conv(input), under autocast as F.conv2d. Throws Unusual.
at::Tensor conv(const at::Tensor& input, const Convolution& conv);

namespace functional {

pybind11::object add_relu(pybind11::handle input, pybind11::handle residual);

pybind11::object bn_relu(pybind11::handle input, pybind11::handle residual,
                         pybind11::handle running_mean, pybind11::handle running_var,
                         pybind11::handle weight, pybind11::handle bias, pybind11::handle training,
                         pybind11::handle momentum, pybind11::handle eps, bool relu);

pybind11::object conv_bn_relu(pybind11::handle input, pybind11::handle residual,
                              pybind11::handle weight, pybind11::handle bias,
                              pybind11::handle stride, pybind11::handle padding,
                              pybind11::handle dilation, pybind11::handle groups,
                              pybind11::handle running_mean, pybind11::handle running_var,
                              pybind11::handle bn_weight, pybind11::handle bn_bias,
                              pybind11::handle training, pybind11::handle momentum,
                              pybind11::handle eps, bool relu);

}  // namespace functional
}  // namespace fastres
