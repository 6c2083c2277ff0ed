#include "modules.h"

#include <array>

namespace fastres {
namespace {

namespace py = pybind11;

struct Names {
  const std::array<PyObject*, 4> hooks{intern("_forward_hooks"), intern("_forward_pre_hooks"),
                                       intern("_backward_hooks"), intern("_backward_pre_hooks")};
  const std::array<PyObject*, 4> global_hooks{
      keep("torch.nn.modules.module", "_global_forward_hooks"),
      keep("torch.nn.modules.module", "_global_forward_pre_hooks"),
      keep("torch.nn.modules.module", "_global_backward_hooks"),
      keep("torch.nn.modules.module", "_global_backward_pre_hooks")};
  PyObject* const forward = intern("forward");
  PyObject* const modules = intern("_modules");
};

const Names& names() {
  static const auto* const instance = new Names;
  return *instance;
}

py::object dictionary_of(PyObject* module) {
  PyObject** const dict = _PyObject_GetDictPtr(module);
  return dict != nullptr && *dict != nullptr
             ? py::reinterpret_borrow<py::object>(*dict)
             : py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
}

PyObject* item_of(PyObject* dict, PyObject* name) {
  require(PyDict_Check(dict));
  return PyDict_GetItemWithError(dict, name);
}

bool is_empty(PyObject* dict) { return PyDict_Check(dict) && PyDict_GET_SIZE(dict) == 0; }

}  // namespace

PyObject* keep(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }

Plain::Plain(PyObject* module) : owned_(dictionary_of(module)) {
  require(find(names().forward) == nullptr);
  for (PyObject* name : names().hooks) require(is_empty(get(name)));
  for (PyObject* hooks : names().global_hooks) require(is_empty(hooks));
}

Plain::Plain(PyObject* module, PyObject* cls)
    : Plain((require(reinterpret_cast<PyObject*>(Py_TYPE(module)) == cls), module)) {}

PyObject* Plain::find(PyObject* name) const { return item_of(owned_.ptr(), name); }

PyObject* Plain::get(PyObject* name) const {
  PyObject* const value = find(name);
  require(value != nullptr);
  return value;
}

OptionalTensor Plain::tensor(PyObject* registry, PyObject* name) const {
  PyObject* const value = item_of(get(registry), name);
  require(value != nullptr);
  return optional_tensor_of(value);
}

PyObject* child_of(PyObject* module, PyObject* name) {
  const auto dict = dictionary_of(module);
  PyObject* const children = PyDict_GetItemWithError(dict.ptr(), names().modules);
  PyObject* const child = children == nullptr ? nullptr : PyDict_GetItemWithError(children, name);
  if (child == nullptr) throw py::key_error(PyUnicode_AsUTF8(name));
  return child;
}

}  // namespace fastres
