// The sites of fastres/sites.py on the CPU, for the case that needs no second thought.
#pragma once

#include <pybind11/pybind11.h>

namespace fastres {

// act(bn(conv(input)) + residual) and act(bn(input) + residual) with the modules' own parameters;
// None where anything is out of the ordinary, and then nothing has happened.
// Looking at modules from here takes a tenth of what it takes from Python, whose interpreter finds
// the caches full of activations after every convolution.
pybind11::object conv_bn_act(pybind11::handle input, pybind11::handle conv, pybind11::handle bn,
                             pybind11::handle act, pybind11::handle residual, pybind11::handle via);
pybind11::object bn_act(pybind11::handle input, pybind11::handle bn, pybind11::handle act,
                        pybind11::handle residual, pybind11::handle via);

// The same for a caller who needs the residual no more, and has one reference to it: where nobody
// else has any, the output may take its place.
pybind11::object conv_bn_act_reusing(pybind11::handle input, pybind11::handle conv,
                                     pybind11::handle bn, pybind11::handle act,
                                     pybind11::handle residual, pybind11::handle via);

// conv(input) where it is recorded.
pybind11::object convolve(pybind11::handle input, pybind11::handle conv);

// pool(act(bn(conv(input)))) and linear(pooling(input)) in inference.
pybind11::object conv_bn_act_pool(pybind11::handle input, pybind11::handle conv,
                                  pybind11::handle bn, pybind11::handle act, pybind11::handle pool,
                                  pybind11::handle via);
pybind11::object mean_linear(pybind11::handle input, pybind11::handle pooling,
                             pybind11::handle linear);

}  // namespace fastres
