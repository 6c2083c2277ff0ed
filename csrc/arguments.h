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

// Whether Python raised this to refuse arguments, as functional.REFUSED has it: under a dispatch
// mode operators are called through Python.
bool is_refusal(const pybind11::error_already_set& error);

// The tensor that call() returns. None, after undo(), for the unusual and for what an operator
// refuses: Python finds out what is wrong, and says it. What a hook raises is the caller's.
template <typename F, typename Undo>
pybind11::object unless_unusual(const F& call, const Undo& undo) {
  namespace py = pybind11;
  try {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(call()));
  } catch (const Unusual&) {
  } catch (const c10::Error&) {
  } catch (const py::error_already_set& error) {
    if (!is_refusal(error)) throw;
  } catch (python_error& raised) {
    raised.restore();
    const py::error_already_set error;
    if (!is_refusal(error)) throw error;
  }
  undo();
  return py::none();
}

template <typename F>
pybind11::object unless_unusual(const F& call) {
  return unless_unusual(call, [] {});
}

}  // namespace fastres
