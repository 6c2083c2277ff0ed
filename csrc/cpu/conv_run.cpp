#include "conv_run.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <atomic>
#include <type_traits>

#include "conv_kernels.h"
#include "conv_scratch.h"
#include "memory.h"

namespace fastres::cpu {
namespace {

template <typename T>
DirectConvKernel<T> direct_kernel([[maybe_unused]] ConvAlgorithm algorithm) {
#if defined(FASTRES_X86)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (algorithm == ConvAlgorithm::kDirectBf16) return AVX512_BF16::direct_conv_kernel<T>();
  }
#endif
  return FASTRES_SELECT_VECTOR_KERNELS(direct_conv_kernel, T);
}

template <typename T>
GroupedConvKernel<T> grouped_kernel([[maybe_unused]] ConvAlgorithm algorithm) {
#if defined(FASTRES_X86)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (algorithm == ConvAlgorithm::kGroupedBf16) return AVX512_BF16::grouped_conv_kernel<T>();
  }
#endif
  return FASTRES_SELECT_VECTOR_KERNELS(grouped_conv_kernel, T);
}

template <typename T>
WinogradJob<T>* winograd_job(ConvAlgorithm algorithm, const ConvShape& shape) {
  static const auto winograd = FASTRES_SELECT_VECTOR_KERNELS(winograd_kernels, T);
  static const auto polyphase = FASTRES_SELECT_VECTOR_KERNELS(polyphase_kernels, T);
  if (algorithm == ConvAlgorithm::kPolyphasePlain) return polyphase.of3_plain;
  if (algorithm == ConvAlgorithm::kPolyphase) return shape.r == 3 ? polyphase.of3 : polyphase.of7;
  if (algorithm == ConvAlgorithm::kWinograd4Plain) return winograd.f4_plain;
  return algorithm == ConvAlgorithm::kWinograd2 ? winograd.f2 : winograd.f4;
}

}  // namespace

int64_t conv_panel() {
  static const int64_t panel = FASTRES_SELECT_VECTOR_KERNELS(direct_conv_kernel, float).panel;
  return panel;
}

template <typename T>
bool run_conv(const ConvShape& shape, ConvAlgorithm algorithm, const ConvOperands<T>& operands,
              c10::function_ref<void(Range)> beside) {
  const auto direct = direct_kernel<T>(algorithm);
  const auto grouped = grouped_kernel<T>(algorithm);
  WinogradJob<T>* const winograd = winograd_job<T>(algorithm, shape);
  const auto jobs = plan_jobs(shape, algorithm, direct.panel, at::get_num_threads());
  const int64_t values = scratch_values(shape, algorithm, jobs.block_rows(), direct.panel);
  std::atomic<bool> finite{true};
  at::parallel_for(0, jobs.count(), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch own;
    float* const scratch = own.of_size(values);
    for (int64_t job = begin; job < end; ++job) {
      const auto work = jobs.at(job, end);
      if (is_grouped(algorithm)) {
        grouped.run(shape, operands, work, scratch);
      } else if (!is_winograd(algorithm)) {
        direct.run(shape, operands, work, scratch);
      } else if (!winograd(shape, operands, work, scratch)) {
        finite.store(false, std::memory_order_relaxed);
      }
    }
    beside({shape.k * begin / jobs.count(), shape.k * end / jobs.count()});
  });
  return finite;
}

template bool run_conv(const ConvShape&, ConvAlgorithm, const ConvOperands<float>&,
                       c10::function_ref<void(Range)>);
template bool run_conv(const ConvShape&, ConvAlgorithm, const ConvOperands<c10::BFloat16>&,
                       c10::function_ref<void(Range)>);
template bool run_conv(const ConvShape&, ConvAlgorithm, const ConvOperands<c10::Half>&,
                       c10::function_ref<void(Range)>);

}  // namespace fastres::cpu
