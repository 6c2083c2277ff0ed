// Arguments as Python hands them in, read where they are nothing out of the ordinary. All else is
// left to Python, which knows every case and has the words for a mistake.
#pragma once

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "autograd.h"

namespace fastres {

// Thrown, and caught in unless_unusual, where a call is left to Python.
struct Unusual {};

inline void require(bool condition) {
  if (!condition) throw Unusual();
}

// A dense CPU tensor of no subclass but nn.Parameter; the second one, or None.
const at::Tensor& tensor_of(PyObject* value);
OptionalTensor optional_tensor_of(PyObject* value);

// A map (N, C, H, W), not empty, in a call that nobody but a dispatch mode watches.
const at::Tensor& activation_of(PyObject* value);

bool bool_of(PyObject* value);
double double_of(PyObject* value);
int64_t int_of(PyObject* value);

// An int for both dimensions of a map, or a tuple of two.
cpu::Pair pair_of(PyObject* value);

// The tensor that call() returns; None for the unusual and for what an operator refuses, before it
// has changed anything: Python finds out what is wrong, and says it.
template <typename F>
pybind11::object unless_unusual(const F& call) {
  try {
    return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(call()));
  } catch (const Unusual&) {
    return pybind11::none();
  } catch (const c10::Error&) {
    return pybind11::none();
  } catch (python_error& raised_by_a_hook) {
    raised_by_a_hook.restore();
    throw pybind11::error_already_set();
  }
}

}  // namespace fastres
