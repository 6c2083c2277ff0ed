#include "arguments.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "checks.h"

namespace fastres {

const at::Tensor& tensor_of(PyObject* value) {
  require(THPVariable_CheckExact(value));
  const auto& t = THPVariable_Unpack(value);
  require(t.device().is_cpu() && t.layout() == at::kStrided);
  return t;
}

OptionalTensor optional_tensor_of(PyObject* value) {
  if (value == Py_None) return std::nullopt;
  return tensor_of(value);
}

const at::Tensor& activation_of(PyObject* value) {
  const auto& x = tensor_of(value);
  require(x.dim() == 4 && x.numel() > 0 && is_supported_dtype(x.scalar_type()));
  require(!at::impl::torch_function_mode_enabled());
  require(!c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer));  // torch.jit.trace
  return x;
}

bool bool_of(PyObject* value) {
  require(PyBool_Check(value));
  return value == Py_True;
}

double double_of(PyObject* value) {
  require(PyFloat_CheckExact(value));
  return PyFloat_AS_DOUBLE(value);
}

int64_t int_of(PyObject* value) {
  require(PyLong_CheckExact(value));
  int overflow = 0;
  const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
  require(overflow == 0);
  return number;
}

cpu::Pair pair_of(PyObject* value) {
  if (PyLong_CheckExact(value)) return {int_of(value), int_of(value)};
  require(PyTuple_CheckExact(value) && PyTuple_GET_SIZE(value) == 2);
  return {int_of(PyTuple_GET_ITEM(value, 0)), int_of(PyTuple_GET_ITEM(value, 1))};
}

bool is_refusal(const pybind11::error_already_set& error) {
  return error.matches(PyExc_TypeError) || error.matches(PyExc_ValueError) ||
         error.matches(PyExc_RuntimeError);
}

}  // namespace fastres
