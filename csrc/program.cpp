#include "program.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "modules.h"
#include "sites.h"

namespace fastres {
namespace {

namespace py = pybind11;

py::object method(py::handle cls, py::handle name) { return py::getattr(cls, name, py::none()); }

struct Known {
  PyObject* const sequential = keep("torch.nn", "Sequential");
  PyObject* const identity = keep("torch.nn", "Identity");
  PyObject* const call = intern("__call__");
  PyObject* const forward = intern("forward");
  const py::object module_call = method(keep("torch.nn", "Module"), call);
  const py::object sequential_forward = method(sequential, forward);
  const py::object identity_forward = method(identity, forward);
  PyObject* const modules = intern("_modules");
  PyObject* const training = intern("training");
  PyObject* const compiled = intern("_compiled_call_impl");
  // Of fastres/convert/swap.py.
  PyObject* const own_class = intern("_fastres_class");
  PyObject* const own_forward = intern("_fastres_forward");
  PyObject* const plan = intern("_fastres_plan");
  PyObject* const entry = intern("_fastres_entry");
  PyObject* const program_train = intern("program_train");
  PyObject* const program_evaluate = intern("program_evaluate");
  PyObject* const condition_train = intern("condition_train");
  PyObject* const condition_evaluate = intern("condition_evaluate");
};

const Known& known() {
  static const auto* const instance = new Known;
  return *instance;
}

// --- how fastres/convert/program.py writes steps ---

Operand operand_of(py::handle written) {
  const auto [kind, value] = written.cast<std::pair<std::string, py::object>>();
  Operand operand{};
  if (kind == "value") {
    operand.kind = Operand::kValue;
    operand.value = value.cast<int64_t>();
  } else if (kind == "module") {
    operand.kind = Operand::kModule;
    for (py::handle name : value) operand.path.push_back(py::reinterpret_borrow<py::object>(name));
  } else if (kind == "tuple") {
    operand.kind = Operand::kTuple;
    for (py::handle item : value) operand.items.push_back(operand_of(item));
  } else {
    operand.kind = Operand::kConstant;
    operand.constant = value;
  }
  return operand;
}

Step::Site site_of(const std::string& name) {
  if (name == "conv_bn_act") return Step::kConvBnAct;
  if (name == "bn_act") return Step::kBnAct;
  if (name == "convolve") return Step::kConvolve;
  if (name == "conv_bn_act_pool") return Step::kConvBnActPool;
  return name == "mean_linear" ? Step::kMeanLinear : Step::kNone;
}

Step step_of(py::handle written) {
  const auto fields = written.cast<py::tuple>();
  Step step{
      site_of(fields[0].cast<std::string>()), fields[1], {}, fields[3], fields[4].cast<int64_t>(),
      fields[5].cast<std::vector<int64_t>>()};
  for (py::handle operand : fields[2]) step.operands.push_back(operand_of(operand));
  const size_t by_position = step.operands.size() - step.names.size();
  for (size_t i = 0; i < step.names.size(); ++i) {
    if (step.names[i].cast<std::string>() == "via")
      step.via = static_cast<int64_t>(by_position + i);
  }
  if (step.site == Step::kConvBnAct && step.operands[4].kind == Operand::kValue) {
    const auto residual = step.operands[4].value;
    step.gives_residual =
        std::find(step.last.begin(), step.last.end(), residual) != step.last.end();
  }
  return step;
}

// --- calls ---

using Values = std::vector<py::object>;

py::object resolve(const Operand& operand, py::handle module, const Values& values) {
  switch (operand.kind) {
    case Operand::kValue:
      return values[operand.value];
    case Operand::kModule: {
      PyObject* found = module.ptr();
      for (const auto& name : operand.path) found = child_of(found, name.ptr());
      return py::reinterpret_borrow<py::object>(found);
    }
    case Operand::kTuple: {
      py::tuple items(operand.items.size());
      for (size_t i = 0; i < operand.items.size(); ++i) {
        items[i] = resolve(operand.items[i], module, values);
      }
      return items;
    }
    default:
      return operand.constant;
  }
}

py::object call(py::handle function, const Values& operands, py::handle names) {
  std::array<PyObject*, 16> arguments;
  TORCH_CHECK(operands.size() <= arguments.size(), "a step of ", operands.size(), " operands");
  for (size_t i = 0; i < operands.size(); ++i) arguments[i] = operands[i].ptr();
  const size_t by_name = names.is_none() ? 0 : PyTuple_GET_SIZE(names.ptr());
  PyObject* const result =
      PyObject_Vectorcall(function.ptr(), arguments.data(), operands.size() - by_name,
                          by_name == 0 ? nullptr : names.ptr());
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object call_module(py::handle module, py::object input);

// Whether a call of a module of this class is nn.Module's, and runs `forward`: either may have been
// overridden or patched.
bool runs(PyObject* type, const py::object& forward) {
  return method(type, known().call).is(known().module_call) &&
         method(type, known().forward).is(forward);
}

// What is inside a module, where a call of it is that and nothing else.
struct Inside {
  enum { kUnknown, kNothing, kChildren, kProgram } kind = kUnknown;
  Values children;
  py::object program;  // kept alive
};

bool is_compiled(const Plain& module) {
  PyObject* const call = module.find(known().compiled);
  return call != nullptr && call != Py_None;
}

Inside inside_of(py::handle module) {
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(module.ptr()));
  try {
    require(!c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Tracer));
    if (type == known().identity) {
      const Plain identity(module.ptr());
      require(!is_compiled(identity) && runs(type, known().identity_forward));
      return {Inside::kNothing, {}, {}};
    }
    if (type == known().sequential) {
      const Plain container(module.ptr());
      require(!is_compiled(container) && runs(type, known().sequential_forward));
      Inside inside{Inside::kChildren, {}, {}};
      for (const auto& child : py::reinterpret_borrow<py::dict>(container.get(known().modules))) {
        inside.children.push_back(py::reinterpret_borrow<py::object>(child.second));
      }
      return inside;
    }
    // Sub-classed since it was converted, it has the attribute of its base.
    require(method(type, known().own_class).ptr() == type);
    require(runs(type, method(type, known().own_forward)));
    const Plain converted(module.ptr());
    require(!is_compiled(converted));
    require(PyObject_Not(converted.get(known().entry)) == 1);
    const bool training = bool_of(converted.get(known().training));
    const py::handle plan = converted.get(known().plan);
    const auto program =
        py::getattr(plan, training ? known().program_train : known().program_evaluate, py::none());
    require(!program.is_none());
    const auto condition =
        py::getattr(plan, training ? known().condition_train : known().condition_evaluate);
    require(condition.is_none() || condition(module).ptr() == Py_True);
    return {Inside::kProgram, {}, program};
  } catch (const Unusual&) {
    return {};
  }
}

py::object call_module(py::handle module, py::object input) {
  if (THPVariable_CheckExact(input.ptr())) {
    const auto inside = inside_of(module);
    switch (inside.kind) {
      case Inside::kNothing:
        return input;
      case Inside::kChildren:
        for (const auto& child : inside.children) input = call_module(child, std::move(input));
        return input;
      case Inside::kProgram: {
        Values values;  // not from a list, which would keep the input
        values.push_back(std::move(input));
        return inside.program.cast<const Program&>().run(module, std::move(values));
      }
      default:
        break;
    }
  }
  return call(module, {std::move(input)}, py::none());
}

// What the extension makes of a site; None where that is left to Python.
py::object call_site(const Step& step, const Values& operands) {
  const py::object via = step.via < 0 ? py::tuple() : operands[step.via];
  const auto& o = operands;
  switch (step.site) {
    case Step::kConvBnAct:
      return step.gives_residual ? conv_bn_act_reusing(o[0], o[1], o[2], o[3], o[4], via)
                                 : conv_bn_act(o[0], o[1], o[2], o[3], o[4], via);
    case Step::kBnAct:
      return bn_act(o[0], o[1], o[2], o[3], via);
    case Step::kConvolve:
      return convolve(o[0], o[1]);
    case Step::kConvBnActPool:
      return conv_bn_act_pool(o[0], o[1], o[2], o[3], o[4], via);
    case Step::kMeanLinear:
      return mean_linear(o[0], o[2], o[3]);
    default:
      return py::none();
  }
}

py::object run_step(const Step& step, py::handle module, Values& values) {
  Values operands;
  operands.reserve(step.operands.size());
  for (const auto& operand : step.operands) operands.push_back(resolve(operand, module, values));
  for (const int64_t value : step.last) values[value] = py::object();
  if (step.function.is_none()) return call_module(operands[0], std::move(operands[1]));
  if (step.site != Step::kNone) {
    auto result = call_site(step, operands);
    if (!result.is_none()) return result;
  }
  return call(step.function, operands, step.names);
}

}  // namespace

Program::Program(const py::list& steps, int64_t values, int64_t output)
    : values_(values), output_(output) {
  for (py::handle written : steps) steps_.push_back(step_of(written));
}

py::object Program::run(py::handle module, Values values) const {
  values.resize(values_);
  for (const auto& step : steps_) {
    values[step.result] = run_step(step, module, values);
  }
  return std::move(values[output_]);
}

void register_program(py::module_& m) {
  known();  // before anybody patches a class
  py::class_<Program>(m, "Program", "A converted module's forward; see csrc/program.h.")
      .def(py::init<const py::list&, int64_t, int64_t>())
      .def("__call__", [](const Program& program, py::handle module, const py::args& inputs) {
        Values values;
        for (py::handle input : inputs) values.push_back(py::reinterpret_borrow<py::object>(input));
        return program.run(module, std::move(values));
      });
}

}  // namespace fastres
