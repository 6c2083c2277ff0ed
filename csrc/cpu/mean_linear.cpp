#include "mean_linear.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

#include "../checks.h"
#include "operators.h"

namespace fastres::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Rows that our product serves faster than a library's, which does not wait for the weight longer
// with more of them. Measured on Zen 4 with 512 and 2048 channels.
constexpr int64_t kFewRows = 8;

// Values that are worth a thread of their own.
constexpr int64_t kGrain = 32768;

void check_mean_linear(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias) {
  check_activation(input, "input", at::kCPU);
  const auto check = [&](const at::Tensor& t, const char* name) {
    check_tensor(t, name, at::kCPU);
    TORCH_CHECK(t.scalar_type() == input.scalar_type(), name, ": expected the dtype of input, ",
                input.scalar_type(), ", got ", t.scalar_type());
  };
  check(weight, "weight");
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == input.size(1),
              "weight: expected shape (K, C) with the ", input.size(1), " channels of input, got ",
              weight.sizes());
  if (!given(bias)) return;
  check(*bias, "bias");
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias: expected shape [",
              weight.size(0), "], one value per output, got ", bias->sizes());
}

// The means of every channel in the accumulation type, zeros behind the last.
template <typename T>
at::Tensor means(const at::Tensor& input, const MeanLinearKernels<T>& kernels) {
  const int64_t n = input.size(0), c = input.size(1), pixels = input.size(2) * input.size(3);
  const int64_t stride = (c + kChannelPadding - 1) / kChannelPadding * kChannelPadding;
  auto x = at::zeros({n, stride}, input.options().dtype(accumulate_dtype(input.scalar_type())));
  if (!input.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    x.narrow(1, 0, c).copy_(at::mean(input, {2, 3}));
    return x;
  }
  const T* const from = input.const_data_ptr<T>();
  auto* const to = x.mutable_data_ptr<acc_t<T>>();
  const int64_t grain = std::max(int64_t{1}, kGrain / (pixels * c));
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.mean(from + i * pixels * c, pixels, c, to + i * stride);
    }
  });
  return x;
}

template <typename T>
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                  const MeanLinearKernels<T>& kernels) {
  const int64_t n = x.size(0), k = weight.size(0), c = weight.size(1);
  const auto w = weight.contiguous();
  const auto b = given(bias) ? bias->contiguous() : at::Tensor();
  auto output = at::empty({n, k}, weight.options());
  const LinearOperands<T> operands{x.const_data_ptr<acc_t<T>>(),
                                   n,
                                   c,
                                   k,
                                   x.size(1),
                                   w.const_data_ptr<T>(),
                                   b.defined() ? b.const_data_ptr<T>() : nullptr,
                                   output.mutable_data_ptr<T>()};
  at::parallel_for(0, k, std::max(int64_t{1}, kGrain / (n * c)),
                   [&](int64_t begin, int64_t end) { kernels.linear(operands, begin, end); });
  return output;
}

}  // namespace

at::Tensor mean_linear(const at::Tensor& input, const at::Tensor& weight,
                       const OptionalTensor& bias) {
  check_mean_linear(input, weight, bias);
  // The operators below must not meet autograd or autocast again.
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  if (input.numel() == 0 || weight.size(0) == 0) {
    return at::linear(at::mean(input, {2, 3}), weight, bias);
  }
  const auto dtype = input.scalar_type();
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "mean_linear", [&] {
    static const auto kernels = FASTRES_SELECT_KERNELS(mean_linear_kernels, scalar_t);
    const auto x = means<scalar_t>(input, kernels);
    if (x.size(0) <= kFewRows) return linear<scalar_t>(x, weight, bias, kernels);
    return at::linear(x.narrow(1, 0, weight.size(1)).to(dtype), weight, bias);
  });
}

}  // namespace fastres::cpu
