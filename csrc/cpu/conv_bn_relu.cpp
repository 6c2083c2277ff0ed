#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/any.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/isnan.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/relu.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>

#include "../checks.h"
#include "capability.h"
#include "conv_arguments.h"
#include "conv_fold_cache.h"
#include "conv_pack.h"
#include "conv_pool.h"
#include "conv_run.h"
#include "invalid_flag.h"
#include "operators.h"
#include "pooled.h"

namespace fastres::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// --- oneDNN, through the operators that ATen registers for its own compiler ---

template <typename Signature>
auto find_operator(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

bool onednn_serves(at::ScalarType dtype) {
  if (!at::hasMKLDNN() || !at::globalContext().userEnabledMkldnn()) return false;
  if (dtype == at::kFloat) return true;
  static const bool bf16 = find_operator<bool()>("mkldnn::_is_mkldnn_bf16_supported", "").call();
  static const bool fp16 = find_operator<bool()>("mkldnn::_is_mkldnn_fp16_supported", "").call();
  return (dtype == at::kBFloat16 && bf16) || (dtype == at::kHalf && fp16);
}

// Without instructions for narrow types, ATen's convolutions of them are many times slower than
// oneDNN's in fp32, which also rounds just once.
at::ScalarType compute_dtype(at::ScalarType dtype) {
  const bool narrow = dtype == at::kBFloat16 || dtype == at::kHalf;
  return narrow && !onednn_serves(dtype) && onednn_serves(at::kFloat) ? at::kFloat : dtype;
}

using Scalars = c10::List<std::optional<at::Scalar>>;
using Text = std::optional<c10::string_view>;

at::Tensor convolve(const at::Tensor& x, const FoldedConv& f, const ConvGeometry& g, bool relu) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&, at::IntArrayRef,
                 at::IntArrayRef, at::IntArrayRef, int64_t, c10::string_view, Scalars, Text);
  static const auto op = find_operator<Signature>("mkldnn::_convolution_pointwise", "");
  return op.call(x, f.weight, f.bias, g.padding, g.stride, g.dilation, g.groups,
                 relu ? "relu" : "none", Scalars(), "");
}

at::Tensor convolve_add(const at::Tensor& x, const at::Tensor& residual, const FoldedConv& f,
                        const ConvGeometry& g, bool relu) {
  using Signature =
      at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                 at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, int64_t, c10::string_view,
                 std::optional<at::Scalar>, Text, Scalars, Text);
  static const auto op = find_operator<Signature>("mkldnn::_convolution_pointwise", "binary");
  // It does not fuse groups, nor add bfloat16 then, and in PyTorch 2.11 it fails on what fits both
  // memory formats, of one pixel or one channel.
  const bool fits_both =
      residual.is_contiguous() && residual.is_contiguous(at::MemoryFormat::ChannelsLast);
  if (g.groups != 1 || fits_both) {
    const auto y = convolve(x, f, g, /*relu=*/false);
    return relu ? add_relu(y, residual) : y.add(residual);
  }
  return op.call(x, residual, f.weight, f.bias, g.padding, g.stride, g.dilation, g.groups, "add",
                 at::Scalar(1.0), relu ? Text("relu") : Text(), Scalars(), "");
}

// What a call of oneDNN costs beside its arithmetic is more than such a small convolution takes.
// Where the project has no kernels of its own, ATen computes these as a plain matrix product, and
// lays out the weights at every call.
bool is_tiny(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& g) {
  constexpr int64_t kMultiplyAdds = 1 << 21, kWeights = 1 << 16, kElements = 20480;
  if (x.size(0) != 1 || g.groups != 1 || x.numel() > kElements) return false;
  if (weight.numel() > kWeights) return false;
  if (x.scalar_type() != at::kFloat || weight.size(2) > 3 || weight.size(3) > 3) return false;
  const auto size = output_size(x, weight, g);
  return weight.numel() * size[2] * size[3] <= kMultiplyAdds;
}

// The folded convolution in steps.
at::Tensor convolve_tiny(const at::Tensor& x, const OptionalTensor& residual, const FoldedConv& f,
                         const ConvGeometry& g, bool relu) {
  auto y = at::conv2d(x, f.weight, f.bias, g.stride, g.padding, g.dilation, g.groups);
  if (given(residual)) return relu ? add_relu(y, *residual) : y.add_(*residual);
  return relu ? y.relu_() : y;
}

// --- the project's own kernels ---

// Which of them computes this convolution; kOneDnn if none does.
ConvAlgorithm own_algorithm(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& g) {
  const auto dtype = x.scalar_type();
  if (x.numel() == 0 || dtype == at::kDouble) return ConvAlgorithm::kOneDnn;
  bool onednn = onednn_serves(dtype) && !is_tiny(x, weight, g);
  if (dtype == at::kHalf && onednn) return ConvAlgorithm::kOneDnn;
  const auto unit = dtype == at::kBFloat16 ? bfloat16_unit() : Bfloat16Unit::kNone;
  if (unit == Bfloat16Unit::kMatrix && onednn) return ConvAlgorithm::kOneDnn;
  // Without a unit, its float32 and ours are ahead of its bfloat16.
  if (dtype == at::kBFloat16 && unit == Bfloat16Unit::kNone) onednn = false;
  return choose_algorithm(shape_of(x, weight, g), {conv_panel(), onednn, /*pack=*/false,
                                                   /*bf16=*/unit == Bfloat16Unit::kVector});
}

template <typename T>
void run_own(const at::Tensor& x, const OptionalTensor& residual, const ConvBn& c,
             ConvAlgorithm algorithm, bool relu, const MaxPool* pool, const at::Tensor& y) {
  const auto shape = shape_of(x, c.weight, c.geometry);
  // Filters are looked at beside the work, but beforehand where bands leave no place for that and
  // where the output takes the residual's place: then nothing can be computed a second time.
  const bool beforehand = pool != nullptr || (given(residual) && residual->is_same(y));
  const auto run = [&](ConvAlgorithm with) {
    for (;; forget_folded(c)) {
      const auto folded = folded_conv(c, x.sizes(), with);
      const ConvOperands<T> operands{x.const_data_ptr<T>(),
                                     folded.weight.const_data_ptr<float>(),
                                     folded.bias.const_data_ptr<float>(),
                                     given(residual) ? residual->const_data_ptr<T>() : nullptr,
                                     y.mutable_data_ptr<T>(),
                                     relu};
      std::atomic<bool> stale{false};
      const auto look = [&](Range filters) {
        if (folded.unchecked && !folded.unchecked->match(c.weight, filters)) stale = true;
      };
      if (beforehand) look({0, shape.k});
      if (stale) continue;
      const auto beside = [&](Range filters) {
        if (!beforehand) look(filters);
      };
      const bool finite = pool == nullptr ? run_conv<T>(shape, with, operands, beside)
                                          : run_pooled_conv<T>(shape, with, operands, *pool);
      if (!stale) return finite;
    }
  };
  if (!run(algorithm)) run(ConvAlgorithm::kDirect);
}

// Whether packed filters stay in a core's cache: each band of a pooled convolution reads them anew.
bool are_few(const at::Tensor& weight, ConvAlgorithm algorithm) {
  constexpr int64_t kFew = 128 * 1024;
  FilterView filters{};
  filters.k = weight.size(0);
  filters.c = weight.size(1);
  filters.r = weight.size(2);
  filters.s = weight.size(3);
  return packed_values(filters, algorithm) <= kFew;
}

// c.dtype is float32, whatever the activations are; all activations are in channels_last. The pool
// may be null, y the residual.
void run_own(const at::Tensor& x, const OptionalTensor& residual, const ConvBn& c,
             ConvAlgorithm algorithm, bool relu, const MaxPool* pool, const at::Tensor& y) {
  switch (x.scalar_type()) {
    case at::kBFloat16:
      run_own<c10::BFloat16>(x, residual, c, algorithm, relu, pool, y);
      break;
    case at::kHalf:
      run_own<c10::Half>(x, residual, c, algorithm, relu, pool, y);
      break;
    default:
      run_own<float>(x, residual, c, algorithm, relu, pool, y);
  }
}

at::Tensor convolve_own(const at::Tensor& input, const OptionalTensor& residual, const ConvBn& c,
                        ConvAlgorithm algorithm, bool relu, const MaxPool* pool = nullptr) {
  const auto x = in_channels_last(input);
  const auto r = given(residual) ? OptionalTensor(in_channels_last(*residual)) : std::nullopt;
  auto size = output_size(x, c.weight, c.geometry);
  if (pool != nullptr) size = pool->output_size(size);
  const auto y = empty_output(size, x.scalar_type(), at::MemoryFormat::ChannelsLast);
  run_own(x, r, c, algorithm, relu, pool, y);
  return y;
}

// Of a convolution's output.
at::MemoryFormat conv_format(const at::Tensor& input, const at::Tensor& weight) {
  constexpr auto kLast = at::MemoryFormat::ChannelsLast;
  const bool last = output_format(input) == kLast || output_format(weight) == kLast;
  return last ? kLast : at::MemoryFormat::Contiguous;
}

MaxPool check_pool(at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef size) {
  const MaxPool pool{check_pair(kernel, "pool_kernel", 1), check_pair(stride, "pool_stride", 1),
                     check_pair(padding, "pool_padding", 0)};
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK(2 * pool.padding[d] <= pool.kernel[d], "pool_padding: expected half of the kernel ",
                kernel, " at most, got ", padding);
    TORCH_CHECK(size[2 + d] + 2 * pool.padding[d] >= pool.kernel[d], "pool_kernel: ", kernel,
                " reaches over the convolution's output ", size);
  }
  return pool;
}

// Where oneDNN has no such convolution: ATen's, then the normalisation in one pass.
at::Tensor unfolded(const at::Tensor& x, const OptionalTensor& residual, const ConvBn& c,
                    bool relu) {
  const auto& g = c.geometry;
  const auto bias = given(c.bias) ? OptionalTensor(c.bias->to(c.dtype)) : std::nullopt;
  const auto y =
      at::conv2d(x, c.weight.to(c.dtype), bias, g.stride, g.padding, g.dilation, g.groups);
  const auto widen = [&](const at::Tensor& t) { return t.to(accumulate_dtype(c.dtype)); };
  const auto widen_given = [&](const OptionalTensor& t) {
    return given(t) ? OptionalTensor(widen(*t)) : std::nullopt;
  };
  return std::get<0>(bn_relu(y, residual, widen(c.running_mean), widen(c.running_var),
                             widen_given(c.bn_weight), widen_given(c.bn_bias),
                             /*training=*/false, /*momentum=*/0, c.eps, relu));
}

// Pixels of the output from which on to look at all filters beforehand costs nothing beside what it
// saves.
constexpr int64_t kWorthLooking = 1024;

}  // namespace

bool is_faster_in_place(const at::Tensor& input, const at::Tensor& residual,
                        const at::Tensor& weight, const ConvGeometry& g) {
  constexpr auto kLast = at::MemoryFormat::ChannelsLast;
  if (!residual.is_contiguous(kLast) || conv_format(input, weight) != kLast) return false;
  if (residual.numel() < kWorthLooking * weight.size(0)) return false;
  const auto algorithm = own_algorithm(input, weight, g);
  // Winograd's have to be computed again where a sum is not finite.
  return algorithm == ConvAlgorithm::kDirect || algorithm == ConvAlgorithm::kDirectBf16;
}

at::Tensor conv_bn_relu(const at::Tensor& input, const at::Tensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& residual,
                        const at::Tensor& running_mean, const at::Tensor& running_var,
                        const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                        int64_t groups, double eps, bool relu) {
  check_activation(input, "input", at::kCPU);
  const auto geometry = check_geometry(stride, padding, dilation, groups);
  ConvBn c{weight,      bias,      running_mean,
           running_var, bn_weight, bn_bias,
           geometry,    eps,       compute_dtype(input.scalar_type())};
  check_conv_bn(input, residual, c);
  // The operators below must not meet autograd or autocast again.
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);

  const auto format = conv_format(input, weight);
  const auto as_asked = [&](const at::Tensor& y) {
    return y.to(input.scalar_type()).contiguous(format);
  };
  const auto algorithm = own_algorithm(input, weight, geometry);
  if (is_own(algorithm)) {
    c.dtype = at::kFloat;
    return as_asked(convolve_own(input, residual, c, algorithm, relu));
  }
  const auto x = in_channels_last(input.to(c.dtype));
  const auto r =
      given(residual) ? OptionalTensor(in_channels_last(residual->to(c.dtype))) : std::nullopt;
  // A map of one channel and one pixel has no strides that say channels_last.
  if (!onednn_serves(c.dtype) || x.numel() == 0 ||
      output_format(x) != at::MemoryFormat::ChannelsLast || weight.size(0) == 1) {
    return as_asked(unfolded(x, r, c, relu));
  }
  if (is_tiny(x, weight, geometry)) {
    const auto folded = folded_conv(c, x.sizes(), ConvAlgorithm::kAten);
    return as_asked(convolve_tiny(x, r, folded, geometry, relu));
  }
  const auto folded = folded_conv(c, x.sizes(), ConvAlgorithm::kOneDnn);
  const auto y =
      given(r) ? convolve_add(x, *r, folded, geometry, relu) : convolve(x, folded, geometry, relu);
  if (relu && take_invalid_flag()) {
    // Somebody else may have left the flag up: then the folded result stands.
    const auto exact = unfolded(x, r, c, relu);
    if (exact.isnan().any().item<bool>()) return as_asked(exact);
  }
  return as_asked(y);
}

void conv_bn_relu_(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                   const at::Tensor& residual, const at::Tensor& running_mean,
                   const at::Tensor& running_var, const OptionalTensor& bn_weight,
                   const OptionalTensor& bn_bias, at::IntArrayRef stride, at::IntArrayRef padding,
                   at::IntArrayRef dilation, int64_t groups, double eps, bool relu) {
  check_activation(input, "input", at::kCPU);
  const auto geometry = check_geometry(stride, padding, dilation, groups);
  const ConvBn c{weight,  bias,     running_mean, running_var, bn_weight,
                 bn_bias, geometry, eps,          at::kFloat};
  check_conv_bn(input, residual, c);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  if (is_faster_in_place(input, residual, weight, geometry) && !residual.is_alias_of(input)) {
    run_own(in_channels_last(input), residual, c, own_algorithm(input, weight, geometry), relu,
            /*pool=*/nullptr, residual);
    return;
  }
  residual.copy_(conv_bn_relu(input, weight, bias, residual, running_mean, running_var, bn_weight,
                              bn_bias, stride, padding, dilation, groups, eps, relu));
}

at::Tensor conv_bn_relu_pool(const at::Tensor& input, const at::Tensor& weight,
                             const OptionalTensor& bias, const at::Tensor& running_mean,
                             const at::Tensor& running_var, const OptionalTensor& bn_weight,
                             const OptionalTensor& bn_bias, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                             double eps, at::IntArrayRef pool_kernel, at::IntArrayRef pool_stride,
                             at::IntArrayRef pool_padding) {
  check_activation(input, "input", at::kCPU);
  const ConvBn c{weight,
                 bias,
                 running_mean,
                 running_var,
                 bn_weight,
                 bn_bias,
                 check_geometry(stride, padding, dilation, groups),
                 eps,
                 at::kFloat};
  check_conv_bn(input, std::nullopt, c);
  const auto pool =
      check_pool(pool_kernel, pool_stride, pool_padding, output_size(input, weight, c.geometry));
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const auto algorithm = own_algorithm(input, weight, c.geometry);
  if (is_own(algorithm) && are_few(weight, algorithm)) {
    return convolve_own(input, std::nullopt, c, algorithm, /*relu=*/true, &pool)
        .contiguous(conv_format(input, weight));
  }
  const auto y = conv_bn_relu(input, weight, bias, std::nullopt, running_mean, running_var,
                              bn_weight, bn_bias, stride, padding, dilation, groups, eps,
                              /*relu=*/true);
  return at::max_pool2d(y, pool.kernel, pool.stride, pool.padding);
}

}  // namespace fastres::cpu
