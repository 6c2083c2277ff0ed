#include "autograd.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

namespace fastres::autograd {
namespace {

namespace py = pybind11;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// PyTorch's pointer to a node, which is not the same class in all of its versions.
using NodePtr = decltype(torch::autograd::Edge::function);

template <typename Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Past PyTorch's boxed fallback for operators that it knows no derivative of.
template <typename Operator, typename... Args>
auto call(const Operator& op, Args&&... args) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(std::forward<Args>(args)...);
}

OptionalTensor if_defined(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// A node of the graph, with the tensors that its backward needs. PyTorch's own
// torch::autograd::Function costs more than a small map's kernel takes: hence nodes by hand.
template <size_t kSaved>
class Saving : public Node {
 public:
  void save(size_t i, const at::Tensor& t, bool is_output = false) {
    saved_[i] = SavedVariable(t, is_output);
  }
  void save(size_t i, const OptionalTensor& t) {
    if (t) save(i, *t);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& saved : saved_) saved.reset_data();
  }

  // Compiled autograd asks what backward depends on, and traces it on tensors of its own.
  void compiled_args(CompiledNodeArgs& args) const override {
    for (const auto& saved : saved_) args.collect(saved, /*is_output=*/true);
    collect_constants(args);
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& swap) override {
    for (auto& saved : saved_) swap.before(saved);
    auto out = apply(variable_list(grads));
    for (auto& saved : saved_) swap.after(saved);
    return out;
  }

 protected:
  virtual void collect_constants(CompiledNodeArgs&) const {}

  // Throws where one of them was changed since, or released.
  std::array<at::Tensor, kSaved> unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::array<at::Tensor, kSaved> tensors;
    for (size_t i = 0; i < kSaved; ++i) tensors[i] = saved_[i].unpack(getptr());
    return tensors;
  }

 private:
  std::array<SavedVariable, kSaved> saved_;
};

// Makes output the result of a new node, which lives as long as the output does.
template <typename T, typename... Inputs>
T& record(const at::Tensor& output, const Inputs&... inputs) {
  auto* const node = new T;
  const NodePtr owner{std::unique_ptr<Node>(node)};
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  torch::autograd::set_history(output, owner);
  return *node;
}

struct AddReluBackward final : Saving<1> {
  std::string name() const override { return "AddReluBackward"; }

  variable_list apply(variable_list&& grads) override {
    using Signature = at::Tensor(const at::Tensor&, const at::Tensor&);
    static const auto op = find_operator<Signature>("fastres::add_relu_backward");
    variable_list out(2);
    if (!grads[0].defined()) return out;
    const auto [output] = unpack();
    const auto grad = c10::GradMode::is_enabled() ? at::threshold_backward(grads[0], output, 0)
                                                  : call(op, grads[0], output);
    for (size_t i = 0; i < out.size(); ++i) {
      if (task_should_compute_output(i)) out[i] = grad;
    }
    return out;
  }
};

// What the output of a bn_relu without residual can be made of again, to the last bit, so that a
// convolution behind it need not keep it.
struct BnRelu {
  at::Tensor input, weight, bias, mean, invstd;
  bool training;
  double eps;

  at::Tensor output() const {
    using Signature =
        at::Tensor(const at::Tensor&, const OptionalTensor&, const at::Tensor&, const at::Tensor&,
                   const OptionalTensor&, const OptionalTensor&, bool);
    static const auto op = find_operator<Signature>("fastres::bn_relu_apply");
    return call(op, input, std::nullopt, mean, invstd, if_defined(weight), if_defined(bias),
                /*relu=*/true);
  }

  // In PyTorch's own operators, which Python has.
  at::Tensor differentiable_output() const {
    const py::gil_scoped_acquire gil;
    const auto python = py::module_::import("fastres.autograd").attr("bn_relu_output");
    return python(input, if_defined(weight), if_defined(bias), mean, invstd, training, eps)
        .cast<at::Tensor>();
  }
};

struct BnReluBackward final : Saving<6> {
  enum { kInput, kOutput, kWeight, kBias, kMean, kInvstd };
  bool training, relu;
  double eps;

  std::string name() const override { return "BnReluBackward"; }

  void release_variables() override {
    recomputable_ = false;
    Saving::release_variables();
  }

  // Hooks may count on every saved tensor to be unpacked once, or have it moved elsewhere.
  void set_recomputable(const at::Tensor& output) {
    recomputable_ = !at::SavedTensorDefaultHooks::get_hooks();
    version_ = output._version();
  }

  // Of the node that made this tensor; none where it is something else by now, or kept anyway.
  static std::optional<BnRelu> behind(const at::Tensor& output) {
    auto* const node = dynamic_cast<BnReluBackward*>(output.grad_fn().get());
    if (node == nullptr || !node->recomputable_ || output._version() != node->version_) {
      return std::nullopt;
    }
    const auto [input, _, weight, bias, mean, invstd] = node->unpack();
    return BnRelu{input, weight, bias, mean, invstd, node->training, node->eps};
  }

  variable_list apply(variable_list&& grads) override {
    variable_list out(4);
    if (!grads[0].defined()) return out;
    const std::array<bool, 3> wanted{
        task_should_compute_output(0), task_should_compute_output(1),
        task_should_compute_output(2) || task_should_compute_output(3)};
    const auto gradients =
        c10::GradMode::is_enabled() ? differentiable(grads[0], wanted) : fused(grads[0], wanted);
    // The engine casts a gradient to the dtype of what it is for.
    if (wanted[0]) out[0] = std::get<0>(gradients);
    if (wanted[1]) out[1] = std::get<1>(gradients);
    if (task_should_compute_output(2)) out[2] = std::get<2>(gradients);
    if (task_should_compute_output(3)) out[3] = std::get<3>(gradients);
    return out;
  }

 private:
  Gradients fused(const at::Tensor& grad, std::array<bool, 3> wanted) {
    using Signature = Gradients(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                                const at::Tensor&, bool, bool, std::array<bool, 3>);
    static const auto op = find_operator<Signature>("fastres::bn_relu_backward");
    const auto [input, output, weight, bias, mean, invstd] = unpack();
    return call(op, grad, input, if_defined(output), if_defined(weight), if_defined(bias), mean,
                invstd, training, relu, wanted);
  }

  void collect_constants(CompiledNodeArgs& args) const override {
    args.collect(training), args.collect(relu), args.collect(eps);
  }

  // In PyTorch's own operators, which Python has.
  Gradients differentiable(const at::Tensor& grad, std::array<bool, 3> wanted) {
    const auto [input, output, weight, bias, mean, invstd] = unpack();
    const py::gil_scoped_acquire gil;
    const auto python = py::module_::import("fastres.autograd").attr("bn_relu_gradients");
    return python(grad, input, if_defined(output), if_defined(weight), if_defined(bias), mean,
                  invstd, training, eps, relu, wanted)
        .cast<Gradients>();
  }

  std::atomic<bool> recomputable_{false};
  uint32_t version_ = 0;
};

struct ConvBackward final : Saving<6> {
  enum { kInput, kWeight, kBnWeight, kBnBias, kMean, kInvstd };
  cpu::ConvGeometry geometry;

  std::string name() const override { return "ConvBackward"; }

  void save_operands(const at::Tensor& input, const at::Tensor& weight) {
    save(kWeight, weight);
    const auto bn = BnReluBackward::behind(input);
    recompute_ = bn.has_value();
    save(kInput, bn ? bn->input : input);
    if (!bn) return;
    training_ = bn->training, eps_ = bn->eps;
    save(kBnWeight, if_defined(bn->weight));
    save(kBnBias, if_defined(bn->bias));
    save(kMean, bn->mean);
    save(kInvstd, bn->invstd);
  }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(3);
    const std::array<bool, 3> wanted{task_should_compute_output(0), task_should_compute_output(1),
                                     task_should_compute_output(2)};
    return c10::GradMode::is_enabled() ? differentiable(grads[0], wanted) : own(grads[0], wanted);
  }

 private:
  variable_list own(const at::Tensor& grad, std::array<bool, 3> wanted) {
    using Dgrad = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                             at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t);
    using Wgrad = std::tuple<at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, const at::Tensor&, at::IntArrayRef, at::IntArrayRef,
        at::IntArrayRef, int64_t, std::array<bool, 2>);
    static const auto dgrad = find_operator<Dgrad>("fastres::conv_dgrad");
    static const auto wgrad = find_operator<Wgrad>("fastres::conv_wgrad");
    const bool needs_values = wanted[1] || wanted[2];
    const auto [input, weight] = operands([needs_values](const BnRelu& bn) {
      return needs_values ? bn.output() : bn.input;  // dgrad reads nothing but the shape
    });
    const auto& g = geometry;
    variable_list out(3);
    if (wanted[0]) {
      out[0] = call(dgrad, grad, input, weight, g.stride, g.padding, g.dilation, g.groups);
    }
    if (needs_values) {
      const auto [grad_weight, grad_bias] =
          call(wgrad, grad, input, weight, g.stride, g.padding, g.dilation, g.groups,
               std::array<bool, 2>{wanted[1], wanted[2]});
      if (wanted[1]) out[1] = grad_weight;
      if (wanted[2]) out[2] = grad_bias;
    }
    return out;
  }

  void collect_constants(CompiledNodeArgs& args) const override {
    for (const auto& pair : {geometry.stride, geometry.padding, geometry.dilation}) {
      args.collect(pair[0]), args.collect(pair[1]);
    }
    args.collect(geometry.groups);
    args.collect(recompute_), args.collect(training_), args.collect(eps_);
  }

  variable_list differentiable(const at::Tensor& grad, std::array<bool, 3> wanted) {
    const auto [input, weight] =
        operands([](const BnRelu& bn) { return bn.differentiable_output(); });
    const auto& g = geometry;
    const std::array<int64_t, 1> outputs{weight.size(0)};
    auto [grad_input, grad_weight, grad_bias] = at::convolution_backward(
        grad, input, weight, at::IntArrayRef(outputs), g.stride, g.padding, g.dilation,
        /*transposed=*/false, {0, 0}, g.groups, wanted);
    return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
  }

  // The convolution's input and weight.
  template <typename Recompute>
  std::pair<at::Tensor, at::Tensor> operands(const Recompute& recompute) {
    const auto [input, weight, bn_weight, bn_bias, mean, invstd] = unpack();
    if (!recompute_) return {input, weight};
    return {recompute(BnRelu{input, bn_weight, bn_bias, mean, invstd, training_, eps_}), weight};
  }

  bool recompute_ = false, training_ = false;
  double eps_ = 0;
};

}  // namespace

at::Tensor add_relu(const at::Tensor& input, const at::Tensor& residual) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&);
  static const auto op = find_operator<Signature>("fastres::add_relu");
  auto output = call(op, input, residual);
  if (needs_graph(input, residual)) {
    record<AddReluBackward>(output, input, residual).save(0, output, /*is_output=*/true);
  }
  return output;
}

at::Tensor bn_relu(const at::Tensor& input, const OptionalTensor& residual, const BatchNorm& bn,
                   bool relu) {
  using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, bool, double, double, bool);
  static const auto op = find_operator<Signature>("fastres::bn_relu");
  auto [output, mean, invstd] = call(op, input, residual, bn.running_mean, bn.running_var,
                                     bn.weight, bn.bias, bn.training, bn.momentum, bn.eps, relu);
  if (needs_graph(input, residual, bn.weight, bn.bias)) {
    using N = BnReluBackward;
    auto& node = record<N>(output, input, residual, bn.weight, bn.bias);
    node.training = bn.training, node.relu = relu, node.eps = bn.eps;
    node.save(N::kInput, input);
    node.save(N::kWeight, bn.weight);
    if (relu && residual) {  // else the mask is recomputed from the input
      node.save(N::kOutput, output, /*is_output=*/true);
    } else if (relu) {
      node.save(N::kBias, bn.bias);
      node.set_recomputable(output);
    }
    node.save(N::kMean, mean);
    node.save(N::kInvstd, invstd);
  }
  return output;
}

at::Tensor conv(const at::Tensor& input, const Convolution& conv) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                               at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t);
  static const auto op = find_operator<Signature>("fastres::conv");
  const auto& g = conv.geometry;
  auto output = call(op, input, conv.weight, conv.bias, g.stride, g.padding, g.dilation, g.groups);
  if (needs_graph(input, conv.weight, conv.bias)) {
    auto& node = record<ConvBackward>(output, input, conv.weight, conv.bias);
    node.geometry = g;
    node.save_operands(input, conv.weight);
  }
  return output;
}

at::Tensor conv_bn_relu(const at::Tensor& input, const OptionalTensor& residual,
                        const Convolution& conv, const BatchNorm& bn, bool relu) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                 const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                 at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t, double, bool);
  static const auto op = find_operator<Signature>("fastres::conv_bn_relu");
  const auto& g = conv.geometry;
  return call(op, input, conv.weight, conv.bias, residual, *bn.running_mean, *bn.running_var,
              bn.weight, bn.bias, g.stride, g.padding, g.dilation, g.groups, bn.eps, relu);
}

at::Tensor conv_bn_relu_(const at::Tensor& input, const at::Tensor& residual,
                         const Convolution& conv, const BatchNorm& bn, bool relu) {
  using Signature =
      void(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
           const at::Tensor&, const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
           at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t, double, bool);
  static const auto op = find_operator<Signature>("fastres::conv_bn_relu_");
  const auto& g = conv.geometry;
  call(op, input, conv.weight, conv.bias, residual, *bn.running_mean, *bn.running_var, bn.weight,
       bn.bias, g.stride, g.padding, g.dilation, g.groups, bn.eps, relu);
  return residual;
}

at::Tensor conv_bn_relu_pool(const at::Tensor& input, const Convolution& conv, const BatchNorm& bn,
                             const cpu::MaxPool& pool) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                 const at::Tensor&, const OptionalTensor&, const OptionalTensor&, at::IntArrayRef,
                 at::IntArrayRef, at::IntArrayRef, int64_t, double, at::IntArrayRef,
                 at::IntArrayRef, at::IntArrayRef);
  static const auto op = find_operator<Signature>("fastres::conv_bn_relu_pool");
  const auto& g = conv.geometry;
  return call(op, input, conv.weight, conv.bias, *bn.running_mean, *bn.running_var, bn.weight,
              bn.bias, g.stride, g.padding, g.dilation, g.groups, bn.eps, pool.kernel, pool.stride,
              pool.padding);
}

at::Tensor mean_linear(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&);
  static const auto op = find_operator<Signature>("fastres::mean_linear");
  return call(op, input, weight, bias);
}

}  // namespace fastres::autograd
