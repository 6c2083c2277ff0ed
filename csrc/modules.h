// nn.Modules as Python has them: C++ looks at their dictionaries.
#pragma once

#include <pybind11/pybind11.h>

#include "arguments.h"

namespace fastres {

// Objects that live as long as the process, looked up once: borrowed pointers to them are safe.
PyObject* keep(const char* module, const char* name);
PyObject* intern(const char* name);

// A module with nothing but its class's own forward in a call of it: no hook, nothing patched.
class Plain {
 public:
  explicit Plain(PyObject* module);

  // Of exactly this class.
  Plain(PyObject* module, PyObject* cls);

  // An attribute of the instance, borrowed.
  PyObject* get(PyObject* name) const;
  PyObject* find(PyObject* name) const;  // null where the instance has none

  // A registered parameter or buffer; none where None is registered.
  OptionalTensor tensor(PyObject* registry, PyObject* name) const;

 private:
  pybind11::object owned_;  // its __dict__
};

// A sub-module, borrowed; KeyError where there is none of this name.
PyObject* child_of(PyObject* module, PyObject* name);

}  // namespace fastres
