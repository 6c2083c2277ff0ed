#include "sites.h"

#include <ATen/autocast_mode.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "cpu/pooled.h"
#include "functional.h"
#include "modules.h"

namespace fastres {
namespace {

namespace py = pybind11;

struct Known {
  PyObject* const conv = keep("torch.nn", "Conv2d");
  PyObject* const bn = keep("torch.nn", "BatchNorm2d");
  PyObject* const relu = keep("torch.nn", "ReLU");
  PyObject* const identity = keep("torch.nn", "Identity");
  PyObject* const linear = keep("torch.nn", "Linear");
  PyObject* const flatten = keep("torch.nn", "Flatten");
  PyObject* const dropout = keep("torch.nn", "Dropout");
  PyObject* const mean_pool = keep("torch.nn", "AdaptiveAvgPool2d");
  PyObject* const max_pool = keep("torch.nn", "MaxPool2d");
  PyObject* const functional_relu = keep("torch.nn.functional", "relu");
  PyObject* const parameters = intern("_parameters");
  PyObject* const buffers = intern("_buffers");
  PyObject* const weight = intern("weight");
  PyObject* const bias = intern("bias");
  PyObject* const running_mean = intern("running_mean");
  PyObject* const running_var = intern("running_var");
  PyObject* const training = intern("training");
  PyObject* const momentum = intern("momentum");
  PyObject* const num_batches_tracked = intern("num_batches_tracked");
  PyObject* const track_running_stats = intern("track_running_stats");
  PyObject* const eps = intern("eps");
  PyObject* const stride = intern("stride");
  PyObject* const padding = intern("padding");
  PyObject* const dilation = intern("dilation");
  PyObject* const groups = intern("groups");
  PyObject* const padding_mode = intern("padding_mode");
  PyObject* const kernel_size = intern("kernel_size");
  PyObject* const ceil_mode = intern("ceil_mode");
  PyObject* const return_indices = intern("return_indices");
  PyObject* const output_size = intern("output_size");
  PyObject* const start_dim = intern("start_dim");
  PyObject* const end_dim = intern("end_dim");
  PyObject* const pool = intern("pool");
  PyObject* const flatten_name = intern("flatten");
  PyObject* const dim = intern("dim");
  PyObject* const drop = intern("drop");
  PyObject* const act = intern("act");
};

const Known& known() {
  static const auto* const instance = new Known;
  return *instance;
}

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

Convolution convolution_of(PyObject* module) {
  const Plain conv(module, known().conv);
  PyObject* const mode = conv.get(known().padding_mode);
  require(PyUnicode_Check(mode) && PyUnicode_CompareWithASCIIString(mode, "zeros") == 0);
  const auto weight = conv.tensor(known().parameters, known().weight);
  require(weight && weight->dim() == 4);
  return {*weight,
          conv.tensor(known().parameters, known().bias),
          {pair_of(conv.get(known().stride)), pair_of(conv.get(known().padding)),
           pair_of(conv.get(known().dilation)), int_of(conv.get(known().groups))}};
}

// Whether a class is timm's, which is not imported for that.
bool is_timms(PyObject* module, const char* library, const char* name) {
  const py::handle type = reinterpret_cast<PyObject*>(Py_TYPE(module));
  return std::strcmp(Py_TYPE(module)->tp_name, name) == 0 &&
         type.attr("__module__").cast<std::string>() == library;
}

bool is_plain(PyObject* module, PyObject* cls) {
  try {
    Plain(module, cls);
    return true;
  } catch (const Unusual&) {
    return false;
  }
}

// A batch norm with statistics, and the counter of its batches in training.
struct CountingBatchNorm : BatchNorm {
  OptionalTensor batches;
  // Inside timm's: a ReLU, or what is to be called behind, see fusable.acts_apart().
  bool relu = false;
  std::vector<py::object> behind;

  explicit CountingBatchNorm(PyObject* module) {
    const bool timms = is_timms(module, "timm.layers.norm_act", "BatchNormAct2d");
    const Plain bn = timms ? Plain(module) : Plain(module, known().bn);
    if (timms) look_inside(module);
    running_mean = bn.tensor(known().buffers, known().running_mean);
    running_var = bn.tensor(known().buffers, known().running_var);
    weight = bn.tensor(known().parameters, known().weight);
    bias = bn.tensor(known().parameters, known().bias);
    training = bool_of(bn.get(known().training));
    momentum = 0;
    eps = double_of(bn.get(known().eps));
    require(running_mean && running_var);
    if (!training) return;
    momentum = double_of(bn.get(known().momentum));  // None: a cumulative average
    batches = bn.tensor(known().buffers, known().num_batches_tracked);
    require(batches && bool_of(bn.get(known().track_running_stats)));
  }

  void look_inside(PyObject* module) {
    PyObject* const drop = child_of(module, known().drop);
    PyObject* const act = child_of(module, known().act);
    if (!is_plain(drop, known().identity)) call_behind(drop);
    relu = behind.empty() && is_plain(act, known().relu);
    if (!relu && !is_plain(act, known().identity)) call_behind(act);
  }

  void call_behind(PyObject* module) {
    behind.push_back(py::reinterpret_borrow<py::object>(module));
  }

  // Counts the batch before it is normalised, as nn.BatchNorm2d does; gives the counter.
  OptionalTensor count() const {
    if (batches) batches->add_(1);
    return batches;
  }
};

void uncount(const OptionalTensor& batches) {
  if (batches) batches->sub_(1);
}

// What is added to an output of this size and dtype.
OptionalTensor residual_of(py::handle residual, at::IntArrayRef size, at::ScalarType dtype) {
  const auto r = optional_tensor_of(residual.ptr());
  require(!r || (r->sizes() == size && r->scalar_type() == dtype));
  return r;
}

// Of a convolution's output.
at::ScalarType output_dtype(const at::Tensor& x) {
  const bool cast = at::autocast::is_autocast_enabled(at::kCPU) && x.scalar_type() != at::kDouble;
  return cast ? at::autocast::get_autocast_dtype(at::kCPU) : x.scalar_type();
}

cpu::MaxPool max_pool_of(PyObject* module) {
  const Plain pool(module, known().max_pool);
  require(!bool_of(pool.get(known().ceil_mode)) && !bool_of(pool.get(known().return_indices)));
  require(pair_of(pool.get(known().dilation)) == cpu::Pair{1, 1});
  return {pair_of(pool.get(known().kernel_size)), pair_of(pool.get(known().stride)),
          pair_of(pool.get(known().padding))};
}

bool is_timm_pool(PyObject* module, const char* name) {
  return is_timms(module, "timm.layers.adaptive_avgmax_pool", name);
}

// A global average pooling, a flattening of what it gives, or a dropout that drops nothing; see
// fastres/heads.py.
void require_pooling(PyObject* module) {
  if (is_timm_pool(module, "SelectAdaptivePool2d")) {
    const Plain pool(module);
    require_pooling(child_of(module, known().pool));
    PyObject* const flatten = child_of(module, known().flatten_name);
    if (reinterpret_cast<PyObject*>(Py_TYPE(flatten)) != known().identity) {
      return require_pooling(flatten);
    }
    const Plain identity(flatten);
    return;
  }
  if (is_timm_pool(module, "FastAdaptiveAvgPool")) {
    const Plain pool(module);
    require(pair_of(pool.get(known().dim)) == cpu::Pair{2, 3});
    return;
  }
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) == known().dropout) {
    const Plain dropout(module, known().dropout);
    require(!bool_of(dropout.get(known().training)));
  } else if (reinterpret_cast<PyObject*>(Py_TYPE(module)) == known().flatten) {
    const Plain flatten(module, known().flatten);
    require(int_of(flatten.get(known().start_dim)) == 1);
    require(int_of(flatten.get(known().end_dim)) == -1);
  } else {
    const Plain pool(module, known().mean_pool);
    require(pair_of(pool.get(known().output_size)) == cpu::Pair{1, 1});
  }
}

// Whether one reference is all that keeps a tensor, and its memory is its own.
bool is_held_once(PyObject* value) {
  if (!THPVariable_CheckExact(value) || Py_REFCNT(value) != 1) return false;
  const auto& t = THPVariable_Unpack(value);
  return t.use_count() == 1 && t.has_storage() && cpu::owns_output(t);
}

void require_no_autocast() { require(!at::autocast::is_autocast_enabled(at::kCPU)); }

py::object conv_bn_act(py::handle input, py::handle conv_module, py::handle bn_module,
                       py::handle act, py::handle residual, py::handle via, bool reuse) {
  OptionalTensor counted;
  std::vector<py::object> behind;
  const auto site = [&] {
    const auto x = activation_of(input.ptr());
    const auto conv = convolution_of(conv_module.ptr());
    const CountingBatchNorm bn(bn_module.ptr());
    behind = bn.behind;
    require(behind.empty() || (act.is_none() && residual.is_none() && py::len(via) == 0));
    const bool relu = is_relu(act.ptr()) || bn.relu;
    require_identities(via.ptr());
    OptionalTensor r;
    if (!residual.is_none()) {
      require(is_relu(act.ptr()) && !bn.relu);  // which would come before the addition
      const auto& g = conv.geometry;
      require(g.stride[0] > 0 && g.stride[1] > 0);
      r = residual_of(residual, cpu::output_size(x, conv.weight, g), output_dtype(x));
    }
    counted = bn.count();
    const py::gil_scoped_release no_gil;
    return conv_bn_relu(x, r, conv, bn, relu, reuse);
  };
  py::object output = unless_unusual(site, [&] { uncount(counted); });
  if (output.is_none()) return output;
  for (const auto& module : behind) output = module(output);
  return output;
}

}  // namespace

py::object conv_bn_act(py::handle input, py::handle conv, py::handle bn, py::handle act,
                       py::handle residual, py::handle via) {
  return conv_bn_act(input, conv, bn, act, residual, via, /*reuse=*/false);
}

py::object conv_bn_act_reusing(py::handle input, py::handle conv, py::handle bn, py::handle act,
                               py::handle residual, py::handle via) {
  return conv_bn_act(input, conv, bn, act, residual, via, /*reuse=*/is_held_once(residual.ptr()));
}

py::object bn_act(py::handle input, py::handle bn_module, py::handle act, py::handle residual,
                  py::handle via) {
  OptionalTensor counted;
  const auto site = [&] {
    const auto x = activation_of(input.ptr());
    const CountingBatchNorm bn(bn_module.ptr());
    require(bn.behind.empty() && (residual.is_none() || !bn.relu));
    const bool relu = is_relu(act.ptr()) || bn.relu;
    require_identities(via.ptr());
    const auto r = residual_of(residual, x.sizes(), x.scalar_type());
    counted = bn.count();
    const py::gil_scoped_release no_gil;
    return autograd::bn_relu(x, r, bn, relu);
  };
  return unless_unusual(site, [&] { uncount(counted); });
}

py::object convolve(py::handle input, py::handle conv_module) {
  return unless_unusual([&] {
    const auto x = activation_of(input.ptr());
    const auto conv = convolution_of(conv_module.ptr());
    require(needs_graph(x, conv.weight, conv.bias));
    const py::gil_scoped_release no_gil;
    return fastres::conv(x, conv);
  });
}

py::object conv_bn_act_pool(py::handle input, py::handle conv_module, py::handle bn_module,
                            py::handle act, py::handle pool_module, py::handle via) {
  return unless_unusual([&] {
    const auto x = activation_of(input.ptr());
    const auto conv = convolution_of(conv_module.ptr());
    const CountingBatchNorm bn(bn_module.ptr());
    require(!bn.training && bn.behind.empty() && (is_relu(act.ptr()) || bn.relu));
    require_identities(via.ptr());
    const auto pool = max_pool_of(pool_module.ptr());
    require_no_autocast();
    require(!needs_graph(x, conv.weight, conv.bias, bn.weight, bn.bias));
    require(conv.weight.scalar_type() == x.scalar_type());
    require(!conv.bias || conv.bias->scalar_type() == x.scalar_type());
    const py::gil_scoped_release no_gil;
    return autograd::conv_bn_relu_pool(x, conv, bn, pool);
  });
}

py::object mean_linear(py::handle input, py::handle pooling, py::handle linear_module) {
  return unless_unusual([&] {
    const auto x = activation_of(input.ptr());
    require(PyTuple_CheckExact(pooling.ptr()));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(pooling.ptr()); ++i) {
      require_pooling(PyTuple_GET_ITEM(pooling.ptr(), i));
    }
    const Plain linear(linear_module.ptr(), known().linear);
    const auto weight = linear.tensor(known().parameters, known().weight);
    const auto bias = linear.tensor(known().parameters, known().bias);
    require_no_autocast();
    require(weight && !needs_graph(x, *weight, bias));
    const py::gil_scoped_release no_gil;
    return autograd::mean_linear(x, *weight, bias);
  });
}

}  // namespace fastres
