#include "add_relu.cuh"

#include <ATen/Dispatch.h>

#include <limits>
#include <type_traits>

#include "../checks.h"
#include "launch.h"
#include "operators.h"

namespace fastres::cuda {
namespace {

// The device's own type for one of ATen's.
template <typename T>
using device_t =
    std::conditional_t<std::is_same_v<T, c10::Half>, __half,
                       std::conditional_t<std::is_same_v<T, c10::BFloat16>, __nv_bfloat16, T>>;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0; }

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "add_relu: tensor of ", threads,
              " elements is too large for one launch");
  return static_cast<unsigned>(blocks);
}

template <typename T, typename F>
void launch(const T* a, const T* b, T* out, int64_t n, F f, cudaStream_t stream) {
  if (aligned(a) && aligned(b) && aligned(out)) {
    const int64_t threads = n / Pack<T>::kSize + n % Pack<T>::kSize;
    combine_packs<<<blocks_for(threads), kThreads, 0, stream>>>(a, b, out, n, f);
  } else {
    combine_elements<<<blocks_for(n), kThreads, 0, stream>>>(a, b, out, n, f);
  }
  check_launch("add_relu");
}

// f over two checked tensors of equal shape, dtype and device, in the memory format of `like`.
template <typename F>
at::Tensor combine_tensors(const at::Tensor& a, const at::Tensor& b, const at::Tensor& like, F f) {
  const c10::DeviceGuard guard(like.device());
  const auto format = output_format(like);
  const auto x = a.contiguous(format), y = b.contiguous(format);
  auto out = empty_in(like, format);
  if (out.numel() == 0) return out;
  const auto stream = current_stream(like.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like.scalar_type(), "add_relu", [&] {
    using T = device_t<scalar_t>;
    launch(static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(y.const_data_ptr()),
           static_cast<T*>(out.mutable_data_ptr()), out.numel(), f, stream);
  });
  return out;
}

}  // namespace

at::Tensor add_relu(const at::Tensor& input, const at::Tensor& residual) {
  check_tensor(input, "input", at::kCUDA);
  check_like(residual, "residual", input, "input");
  return combine_tensors(input, residual, input, AddRelu{});
}

at::Tensor add_relu_backward(const at::Tensor& grad_output, const at::Tensor& output) {
  check_tensor(output, "output", at::kCUDA);
  check_like(grad_output, "grad_output", output, "output");
  return combine_tensors(grad_output, output, output, ReluMask{});
}

}  // namespace fastres::cuda
