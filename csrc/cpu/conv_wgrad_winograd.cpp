#include "conv_wgrad_winograd.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <atomic>

#include "conv_plan.h"
#include "memory.h"

namespace fastres::cpu {
namespace {

// Channels that are multiplied at once, in the widest vectors.
constexpr int64_t kWgradPanel = 32;

// Whether float32's products are ahead of the processor's of bfloat16. Measured on Zen 4, 2
// threads, 8 images: 4.1, 4.1, 3.8 and 4.1 ms for ResNet-50's four sizes against
// oneDNN's 5.6, 5.4, 5.3 and 6.8, but 5.1 to 6.2 by F(2x2, 3x3). Where hardly a tile shares the
// transformation of the sums the product of matrices is ahead (49 pixels of 512 channels: 1.2 ms
// against 1.4).
bool pays_in_bf16(const ConvShape& shape, int64_t m) {
  constexpr int64_t kOneTile = 64;
  if (bfloat16_unit() == Bfloat16Unit::kNone) return true;
  return bfloat16_unit() == Bfloat16Unit::kVector && m == 4 && shape.pixels() > kOneTile;
}

// False where a sum is not finite. The gradients of the splits lie one after the other.
template <typename T, typename Gradient>
bool run_parts(const ConvShape& shape, const WgradParts& parts, int64_t m,
               WinogradWgradJob<T, Gradient>* run, const WgradOperands<T, Gradient>& operands) {
  const int64_t values = WgradBuffers::values((m + 2) * (m + 2));
  const int64_t size = shape.k * shape.taps() * shape.c;
  std::atomic<bool> finite{true};
  at::parallel_for(0, parts.count(), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch own;
    float* const scratch = own.of_size(values);
    for (int64_t job = begin; job < end; ++job) {
      auto target = operands;
      target.gradient += parts.split_of(job) * size;
      if (!run(shape, target, parts[job], scratch)) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite;
}

// gradient[i] = the sum of what the splits have there.
template <typename T>
void add_splits(const float* partial, int64_t splits, int64_t size, T* gradient) {
  constexpr int64_t kGrain = 4096;
  at::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = partial[i];
      for (int64_t split = 1; split < splits; ++split) sum += partial[split * size + i];
      gradient[i] = static_cast<T>(sum);
    }
  });
}

}  // namespace

bool can_compute_winograd_wgrad(const ConvShape& shape) {
  constexpr Pair kOnes{1, 1};
  return capability() != Capability::kDefault && shape.groups == 1 && shape.r == 3 &&
         shape.s == 3 && shape.stride == kOnes && shape.dilation == kOnes;
}

int64_t choose_winograd_wgrad(const ConvShape& shape, bool bf16) {
  if (!can_compute_winograd_wgrad(shape)) return 0;
  const int64_t largest = largest_winograd_tile(), m = largest >= 4 ? 4 : largest >= 2 ? 2 : 0;
  if (m == 0 || (bf16 && !pays_in_bf16(shape, m))) return 0;
  const WinogradForm form{m, 3, 1};
  // Maps of one pixel would take more multiplications than they do as they are defined.
  if (WinogradGrid(shape, form).products(shape, form) >= shape.taps() * shape.pixels()) return 0;
  // Few channels leave lanes idle and transform much for each product: 16 of them, 128 images of
  // 32x32, take 4.1 ms against oneDNN's 2.7; 32, of 16x16, 2.4 against 4.0.
  return 4 * shape.c >= 3 * round_up(shape.c, kWgradPanel) && shape.k >= kWgradPanel ? m : 0;
}

template <typename T>
bool run_winograd_wgrad(const ConvShape& shape, int64_t m, const WgradOperands<T, T>& operands) {
  static const auto kernels = FASTRES_SELECT_VECTOR_KERNELS(winograd_wgrad_kernels, T);
  const WgradParts parts(shape, m);
  if (parts.splits == 1) {
    return run_parts(shape, parts, m, m == 2 ? kernels.f2 : kernels.f4, operands);
  }
  static thread_local Scratch memory;
  const int64_t size = shape.k * shape.taps() * shape.c;
  float* const partial = memory.of_size(parts.splits * size);
  const WgradOperands<T, float> to_partial{operands.input, operands.grad_output, partial};
  auto* const job = m == 2 ? kernels.f2_partial : kernels.f4_partial;
  if (!run_parts(shape, parts, m, job, to_partial)) return false;
  add_splits(partial, parts.splits, size, operands.gradient);
  return true;
}

template bool run_winograd_wgrad(const ConvShape&, int64_t, const WgradOperands<float, float>&);
template bool run_winograd_wgrad(const ConvShape&, int64_t,
                                 const WgradOperands<c10::BFloat16, c10::BFloat16>&);

}  // namespace fastres::cpu
