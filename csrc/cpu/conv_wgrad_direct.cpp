#include "conv_wgrad_direct.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "capability.h"
#include "conv_arguments.h"
#include "conv_wgrad_direct_kernels.h"
#include "memory.h"

namespace fastres::cpu {
namespace {

template <typename T>
DirectWgradKernel<T> kernel_of() {
#if defined(FASTRES_X86)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (bfloat16_unit() == Bfloat16Unit::kVector) return AVX512_BF16::direct_wgrad_kernel<T>();
  }
#endif
  return FASTRES_SELECT_VECTOR_KERNELS(direct_wgrad_kernel, T);
}

// A job for every thread: a slice of the pixels, with sums of its own, some tiles of the filters
// and some panels of the values under them.
struct WgradJobs {
  int64_t slices = 1, rows = 1, columns = 1;

  int64_t count() const { return slices * rows * columns; }
};

// What the threads are shared out to, by the time that a job takes: vectors to copy, of every tile
// and twice of every panel, and the products of tiles and panels, for each of its pixels; then the
// slices' sums, which are cleared and added up.
WgradJobs plan_jobs(const ConvShape& shape, int64_t tiles, int64_t panels, int64_t threads) {
  constexpr double kCopy = 4, kProduct = 14, kSum = 0.25;  // cycles
  WgradJobs best;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t slices = 1; slices <= threads; ++slices) {
    for (int64_t rows = 1; slices * rows <= threads; ++rows) {
      const WgradJobs jobs{slices, std::min(rows, tiles),
                           std::min(threads / (slices * rows), panels)};
      const double t = ceil_div(tiles, jobs.rows), p = ceil_div(panels, jobs.columns);
      const double products = (t * p * kProduct + (t + 2 * p) * kCopy) * shape.pixels() / slices;
      const double sums = kSum * (slices - 1) * shape.k * shape.taps() * shape.c;
      if (products + sums < least) best = jobs, least = products + sums;
    }
  }
  return best;
}

template <typename T>
at::Tensor run(const ConvShape& shape, const T* grad_output, const T* input) {
  static const auto kernel = kernel_of<T>();
  const int64_t tiles = ceil_div(shape.k, kernel.tile_rows);
  const int64_t panels = ceil_div(shape.taps() * shape.c, kernel.panel);
  const auto jobs = plan_jobs(shape, tiles, panels, at::get_num_threads());
  const auto sums = at::zeros({jobs.slices, shape.k, shape.r, shape.s, shape.c}, at::kFloat);
  float* const out = sums.template mutable_data_ptr<float>();
  at::parallel_for(0, jobs.count(), 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch own;
    float* const scratch = own.of_size(kernel.scratch);
    for (int64_t job = begin; job < end; ++job) {
      const int64_t slice = job / (jobs.rows * jobs.columns);
      kernel.run(shape, grad_output, input, part_of(shape.pixels(), jobs.slices, slice),
                 part_of(tiles, jobs.rows, job / jobs.columns % jobs.rows),
                 part_of(panels, jobs.columns, job % jobs.columns), scratch,
                 out + slice * sums.stride(0));
    }
  });
  return jobs.slices == 1 ? sums[0] : sums.sum(0);
}

}  // namespace

bool can_compute_direct_wgrad(const ConvShape& shape) {
  static const int64_t vector = kernel_of<float>().vector;
  return vector > 0 && shape.groups == 1 && shape.c % vector == 0;
}

// Measured on Zen 4, 2 threads, ResNet-50's shapes of 8 images. Where the filters see few values,
// what is packed and gathered is multiplied too seldom. In float32 the others take 0.6 (3x3 filters
// at stride 2) to 1.05 of oneDNN's time, 0.9 in all. With AVX2 alone, whose tiles share less of
// what is gathered, 3x3 filters at stride 2 take 0.6 to 0.99 and those of one tap 0.7 to 0.96 at
// 392 and 784 pixels, but 1.03 to 1.35 of more. In bfloat16 those of one tap and at stride 2 take
// 0.8 to 1 unless their pixels are few. Intel's processors have not been measured.
bool choose_direct_wgrad(const ConvShape& shape, bool bf16) {
  constexpr int64_t kLeastValues = 256, kMostPixelsOfAvx2 = 1024;
  if (!can_compute_direct_wgrad(shape) || is_intel()) return false;
  if (shape.taps() * shape.c < kLeastValues) return false;
  if (!bf16) {
    return capability() == Capability::kAvx512 || shape.taps() > 1 ||
           shape.pixels() <= kMostPixelsOfAvx2;
  }
  const bool gathers_often = shape.taps() > 1 && shape.stride == Pair{1, 1};
  return bfloat16_unit() != Bfloat16Unit::kMatrix && !gathers_often && shape.pixels() > kFewPixels;
}

at::Tensor direct_wgrad(const at::Tensor& grad_output, const at::Tensor& input,
                        const ConvShape& shape) {
  const auto dy = in_channels_last(grad_output), x = in_channels_last(input);
  const auto sums =
      x.scalar_type() == at::kFloat
          ? run(shape, dy.const_data_ptr<float>(), x.const_data_ptr<float>())
          : run(shape, dy.const_data_ptr<c10::BFloat16>(), x.const_data_ptr<c10::BFloat16>());
  return sums.to(x.scalar_type()).permute({0, 3, 1, 2});
}

}  // namespace fastres::cpu
