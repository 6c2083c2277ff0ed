// A converted module's forward as a list of steps, run without Python's interpreter.
//
// Between two convolutions it would find the caches full of activations: what takes it 5 us on its
// own takes it 20 to 30 then.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace fastres {

// What a step is given: a value computed before, the module or one inside it, a constant, or a
// tuple of such.
struct Operand {
  enum Kind { kValue, kModule, kConstant, kTuple } kind;
  int64_t value = 0;
  std::vector<pybind11::object> path;  // names, from the module that runs
  pybind11::object constant;
  std::vector<Operand> items;
};

// result = function(operands, by position and then by name). `site` names what of csrc/sites.h
// computes the same in the usual case; a step without a function calls its first operand, a module.
struct Step {
  enum Site { kNone, kConvBnAct, kBnAct, kConvolve, kConvBnActPool, kMeanLinear } site;
  pybind11::object function;
  std::vector<Operand> operands;
  pybind11::tuple names;
  int64_t result;
  std::vector<int64_t> last;  // values that no later step needs
  int64_t via = -1;           // the operand that a site calls so
  bool gives_residual = false;
};

class Program {
 public:
  // See fastres/convert/program.py, which writes them.
  Program(const pybind11::list& steps, int64_t values, int64_t output);

  // Calls every step in turn, each module inside as nn.Module calls it. Of modules that are
  // converted, plain nn.Sequentials and nn.Identities without hooks, it runs the steps itself.
  pybind11::object run(pybind11::handle module, std::vector<pybind11::object> values) const;

 private:
  std::vector<Step> steps_;
  int64_t values_, output_;
};

void register_program(pybind11::module_& m);

}  // namespace fastres
