#include "sites.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <optional>

#include "checks.h"

namespace fastres {
namespace {

namespace py = pybind11;
using OptionalTensor = std::optional<at::Tensor>;

// Objects that live as long as the process, looked up once: borrowed pointers to them are safe.
PyObject* keep(const char* module, const char* name) {
  return py::object(py::module_::import(module).attr(name)).release().ptr();
}

PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }

struct Known {
  PyObject* const conv = keep("torch.nn", "Conv2d");
  PyObject* const bn = keep("torch.nn", "BatchNorm2d");
  PyObject* const relu = keep("torch.nn", "ReLU");
  PyObject* const identity = keep("torch.nn", "Identity");
  PyObject* const functional_relu = keep("torch.nn.functional", "relu");
  const std::array<PyObject*, 4> hooks{intern("_forward_hooks"), intern("_forward_pre_hooks"),
                                       intern("_backward_hooks"), intern("_backward_pre_hooks")};
  const std::array<PyObject*, 4> global_hooks{
      keep("torch.nn.modules.module", "_global_forward_hooks"),
      keep("torch.nn.modules.module", "_global_forward_pre_hooks"),
      keep("torch.nn.modules.module", "_global_backward_hooks"),
      keep("torch.nn.modules.module", "_global_backward_pre_hooks")};
  PyObject* const forward = intern("forward");
  PyObject* const parameters = intern("_parameters");
  PyObject* const buffers = intern("_buffers");
  PyObject* const weight = intern("weight");
  PyObject* const bias = intern("bias");
  PyObject* const running_mean = intern("running_mean");
  PyObject* const running_var = intern("running_var");
  PyObject* const training = intern("training");
  PyObject* const eps = intern("eps");
  PyObject* const stride = intern("stride");
  PyObject* const padding = intern("padding");
  PyObject* const dilation = intern("dilation");
  PyObject* const groups = intern("groups");
  PyObject* const padding_mode = intern("padding_mode");
};

const Known& known() {
  static const auto* const instance = new Known;
  return *instance;
}

// Thrown, and caught below, where a site is left to Python.
struct Unusual {};

void require(bool condition) {
  if (!condition) throw Unusual();
}

// A module of exactly this class, with nothing but its class's own forward in a call of it.
class Plain {
 public:
  Plain(PyObject* module, PyObject* cls) {
    require(reinterpret_cast<PyObject*>(Py_TYPE(module)) == cls);
    PyObject** const dict = _PyObject_GetDictPtr(module);
    owned_ = dict != nullptr && *dict != nullptr
                 ? py::reinterpret_borrow<py::object>(*dict)
                 : py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    require(PyDict_Check(owned_.ptr()) && find(owned_.ptr(), known().forward) == nullptr);
    for (PyObject* name : known().hooks) require(is_empty(get(name)));
    for (PyObject* hooks : known().global_hooks) require(is_empty(hooks));
  }

  // An attribute of the instance, borrowed.
  PyObject* get(PyObject* name) const {
    PyObject* const value = find(owned_.ptr(), name);
    require(value != nullptr);
    return value;
  }

  // A registered parameter or buffer; none where None is registered.
  OptionalTensor tensor(PyObject* registry, PyObject* name) const {
    PyObject* const value = find(get(registry), name);
    require(value != nullptr);
    if (value == Py_None) return std::nullopt;
    return unpack(value);
  }

  static const at::Tensor& unpack(PyObject* value) {
    require(THPVariable_CheckExact(value));
    const auto& t = THPVariable_Unpack(value);
    require(t.device().is_cpu() && t.layout() == at::kStrided);
    return t;
  }

 private:
  static PyObject* find(PyObject* dict, PyObject* name) {
    require(PyDict_Check(dict));
    return PyDict_GetItemWithError(dict, name);
  }

  static bool is_empty(PyObject* dict) { return PyDict_Check(dict) && PyDict_GET_SIZE(dict) == 0; }

  py::object owned_;
};

bool is_relu(PyObject* act) {
  if (act == Py_None) return false;
  if (act != known().functional_relu) Plain(act, known().relu);
  return true;
}

void require_identities(PyObject* via) {
  require(PyTuple_CheckExact(via));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(via); ++i) {
    Plain(PyTuple_GET_ITEM(via, i), known().identity);
  }
}

std::array<int64_t, 2> pair(PyObject* values) {
  require(PyTuple_CheckExact(values) && PyTuple_GET_SIZE(values) == 2);
  std::array<int64_t, 2> out{};
  for (int i = 0; i < 2; ++i) {
    PyObject* const value = PyTuple_GET_ITEM(values, i);
    require(PyLong_CheckExact(value));
    out[i] = PyLong_AsLongLong(value);
  }
  return out;
}

// A batch norm in eval, with statistics.
struct BatchNorm {
  OptionalTensor running_mean, running_var, weight, bias;
  double eps;

  explicit BatchNorm(PyObject* module) {
    const Plain bn(module, known().bn);
    require(bn.get(known().training) == Py_False);
    running_mean = bn.tensor(known().buffers, known().running_mean);
    running_var = bn.tensor(known().buffers, known().running_var);
    weight = bn.tensor(known().parameters, known().weight);
    bias = bn.tensor(known().parameters, known().bias);
    require(running_mean && running_var && PyFloat_CheckExact(bn.get(known().eps)));
    eps = PyFloat_AS_DOUBLE(bn.get(known().eps));
  }
};

bool records(const at::Tensor& t) { return t.requires_grad(); }
bool records(const OptionalTensor& t) { return t && t->requires_grad(); }

template <typename... Tensors>
void require_no_graph(const Tensors&... tensors) {
  require(!c10::GradMode::is_enabled() || !(records(tensors) || ...));
}

at::Tensor activation(py::handle input) {
  const auto& x = Plain::unpack(input.ptr());
  require(x.dim() == 4 && x.numel() > 0 && is_supported_dtype(x.scalar_type()));
  require(!at::impl::torch_function_mode_enabled() && !at::autocast::is_autocast_enabled(at::kCPU));
  require(!c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer));  // torch.jit.trace
  return x;
}

OptionalTensor residual_of(py::handle residual, const at::Tensor& x, at::IntArrayRef size) {
  if (residual.is_none()) return std::nullopt;
  const auto& r = Plain::unpack(residual.ptr());
  require(r.sizes() == size && r.scalar_type() == x.scalar_type());
  return r;
}

template <typename F>
py::object unless_unusual(const F& site) {
  try {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(site()));
  } catch (const Unusual&) {
    return py::none();
  } catch (const c10::Error&) {
    return py::none();  // refused before anything ran: Python finds out what is wrong, and says it
  }
}

using ConvBnReLU = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                              const OptionalTensor&, const at::Tensor&, const at::Tensor&,
                              const OptionalTensor&, const OptionalTensor&, at::IntArrayRef,
                              at::IntArrayRef, at::IntArrayRef, int64_t, double, bool);
using BnReLU = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, bool, double, double, bool);

// Through the dispatcher, so that dispatch modes, profilers and overrides see the call.
template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

py::object conv_bn_act(py::handle input, py::handle conv_module, py::handle bn_module,
                       py::handle act, py::handle residual, py::handle via) {
  static const auto op = find_operator<ConvBnReLU>("fastres::conv_bn_relu");
  return unless_unusual([&] {
    const auto x = activation(input);
    const Plain conv(conv_module.ptr(), known().conv);
    const BatchNorm bn(bn_module.ptr());
    const bool relu = is_relu(act.ptr());
    require_identities(via.ptr());
    PyObject* const mode = conv.get(known().padding_mode);
    require(PyUnicode_Check(mode) && PyUnicode_CompareWithASCIIString(mode, "zeros") == 0);
    const auto stride = pair(conv.get(known().stride)), padding = pair(conv.get(known().padding)),
               dilation = pair(conv.get(known().dilation));
    require(PyLong_CheckExact(conv.get(known().groups)));
    const int64_t groups = PyLong_AsLongLong(conv.get(known().groups));
    const auto weight = conv.tensor(known().parameters, known().weight);
    const auto bias = conv.tensor(known().parameters, known().bias);
    require(weight && weight->dim() == 4 && weight->scalar_type() == x.scalar_type());
    require(!bias || bias->scalar_type() == x.scalar_type());
    OptionalTensor r;
    if (!residual.is_none()) {
      require(relu && stride[0] > 0 && stride[1] > 0);
      std::array<int64_t, 4> size{x.size(0), weight->size(0), 0, 0};
      for (int d = 0; d < 2; ++d) {
        const int64_t reach = dilation[d] * (weight->size(2 + d) - 1) + 1;
        size[2 + d] = (x.size(2 + d) + 2 * padding[d] - reach) / stride[d] + 1;
      }
      r = residual_of(residual, x, size);
    }
    require_no_graph(x, r, weight, bias, bn.weight, bn.bias);
    const py::gil_scoped_release no_gil;
    return op.call(x, *weight, bias, r, *bn.running_mean, *bn.running_var, bn.weight, bn.bias,
                   stride, padding, dilation, groups, bn.eps, relu);
  });
}

py::object bn_act(py::handle input, py::handle bn_module, py::handle act, py::handle residual,
                  py::handle via) {
  static const auto op = find_operator<BnReLU>("fastres::bn_relu");
  return unless_unusual([&] {
    const auto x = activation(input);
    const BatchNorm bn(bn_module.ptr());
    const bool relu = is_relu(act.ptr());
    require_identities(via.ptr());
    const auto r = residual_of(residual, x, x.sizes());
    require_no_graph(x, r, bn.weight, bn.bias);
    const py::gil_scoped_release no_gil;
    return std::get<0>(op.call(x, r, bn.running_mean, bn.running_var, bn.weight, bn.bias,
                               /*training=*/false, /*momentum=*/0, bn.eps, relu));
  });
}

py::object add_relu(py::handle input, py::handle residual) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&);
  static const auto op = find_operator<Signature>("fastres::add_relu");
  return unless_unusual([&] {
    const auto x = activation(input);
    const auto r = residual_of(residual, x, x.sizes());
    require(r.has_value());
    require_no_graph(x, r);
    const py::gil_scoped_release no_gil;
    return op.call(x, *r);
  });
}

}  // namespace fastres
