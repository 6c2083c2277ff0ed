// The CPU's convolution kernels without PyTorch, for sanitizers and valgrind: every buffer has
// exactly the size that is documented, so that reading or writing past an end is seen. Eight
// threads share one convolution's jobs, and eight callers convolve at once. Exits with 1 where a
// result differs from the definition in fp64.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/capability.h"
#include "../../csrc/cpu/conv_grouped.h"
#include "../../csrc/cpu/conv_kernels.h"
#include "../../csrc/cpu/conv_plan.h"
#include "../../csrc/cpu/conv_scratch.h"

namespace fastres::cpu {
// Stands in for capability.cpp, which asks PyTorch.
Capability capability() { return Capability::kAvx2; }
Bfloat16Unit bfloat16_unit() { return Bfloat16Unit::kNone; }
double multiply_adds() { return 16; }
}  // namespace fastres::cpu

namespace {

using namespace fastres::cpu;
using Values = std::vector<float>;

constexpr int kThreads = 8;

struct Problem {
  ConvShape shape;
  ConvAlgorithm algorithm;
  bool residual, relu;
  Values input, filters, bias, added;  // filters: (K, C / groups, R, S)
};

ConvShape make_shape(int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, int64_t kernel,
                     int64_t stride, int64_t padding, int64_t dilation, int64_t groups = 1) {
  const auto out = [&](int64_t size) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  };
  return {n,
          h,
          w,
          c,
          k,
          kernel,
          kernel,
          out(h),
          out(w),
          {stride, stride},
          {padding, padding},
          {dilation, dilation},
          groups};
}

Problem make_problem(const ConvShape& s, ConvAlgorithm algorithm, bool epilogue) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto values = [&](int64_t count) {
    Values v(count);
    for (auto& x : v) x = normal(random);
    return v;
  };
  return {s,
          algorithm,
          epilogue,
          epilogue,
          values(s.n * s.h * s.w * s.c),
          values(s.k * s.c / s.groups * s.r * s.s),
          values(s.k),
          values(s.pixels() * s.k)};
}

// The definition, in fp64.
double expected(const Problem& p, int64_t n, int64_t y, int64_t x, int64_t k) {
  const auto& s = p.shape;
  const int64_t channels = s.c / s.groups, first = k / (s.k / s.groups) * channels;
  double sum = p.bias[k];
  for (int64_t r = 0; r < s.r; ++r) {
    for (int64_t t = 0; t < s.s; ++t) {
      const int64_t h = y * s.stride[0] - s.padding[0] + r * s.dilation[0];
      const int64_t w = x * s.stride[1] - s.padding[1] + t * s.dilation[1];
      if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
      for (int64_t c = 0; c < channels; ++c) {
        sum += static_cast<double>(p.input[((n * s.h + h) * s.w + w) * s.c + first + c]) *
               p.filters[((k * channels + c) * s.r + r) * s.s + t];
      }
    }
  }
  if (p.residual) sum += p.added[((n * s.p + y) * s.q + x) * s.k + k];
  return p.relu ? std::max(sum, 0.0) : sum;
}

Values packed(const Problem& p, int64_t panel) {
  const auto& s = p.shape;
  const int64_t each = is_plain(p.algorithm)      ? plain_depth(s.c)
                       : is_winograd(p.algorithm) ? winograd_form(p.algorithm, s.r).depth(s.c)
                                                  : round_up(s.taps() * s.c, kChunk);
  const int64_t k = s.k / s.groups, c = s.c / s.groups, filter = c * s.taps();
  const FilterView view{p.filters.data(), k,   c, s.r,      s.s,       filter,
                        s.taps(),         s.s, 1, s.groups, k * filter};
  const auto kernels = AVX2::pack_kernels<float>();
  using enum ConvAlgorithm;
  if (p.algorithm == kGrouped) {
    const GroupedForm form(s, panel / 2);
    Values out(form.panels() * form.packed_panel(s.taps()));
    kernels.grouped(view, {0, form.panels()}, out.data());
    return out;
  }
  Values out(round_up(s.k, panel) * each);
  auto* const pack = p.algorithm == kDirect           ? kernels.direct
                     : p.algorithm == kWinograd2      ? kernels.f2
                     : p.algorithm == kWinograd4      ? kernels.f4
                     : p.algorithm == kWinograd4Plain ? kernels.f4_plain
                     : p.algorithm == kPolyphasePlain ? kernels.polyphase3_plain
                     : s.r == 3                       ? kernels.polyphase3
                                                      : kernels.polyphase7;
  pack(view, {0, ceil_div(s.k, panel)}, out.data());
  return out;
}

void run_job(const Problem& p, const ConvOperands<float>& operands, const ConvJobs& jobs,
             const ConvJob& job, int64_t panel) {
  Values scratch(scratch_values(p.shape, p.algorithm, jobs.block_rows(), panel) + 16);
  auto* const aligned = reinterpret_cast<float*>(
      round_up(reinterpret_cast<int64_t>(scratch.data()), 64));  // as allocate() gives it
  if (p.algorithm == ConvAlgorithm::kDirect) {
    AVX2::direct_conv_kernel<float>().run(p.shape, operands, job, aligned);
    return;
  }
  if (p.algorithm == ConvAlgorithm::kGrouped) {
    AVX2::grouped_conv_kernel<float>().run(p.shape, operands, job, aligned);
    return;
  }
  using enum ConvAlgorithm;
  const auto winograd = AVX2::winograd_kernels<float>();
  const auto polyphase = AVX2::polyphase_kernels<float>();
  auto* const run = p.algorithm == kWinograd2        ? winograd.f2
                    : p.algorithm == kWinograd4      ? winograd.f4
                    : p.algorithm == kWinograd4Plain ? winograd.f4_plain
                    : p.algorithm == kPolyphasePlain ? polyphase.of3_plain
                    : p.shape.r == 3                 ? polyphase.of3
                                                     : polyphase.of7;
  if (!run(p.shape, operands, job, aligned)) std::exit(1);
}

void in_threads(const std::function<void(int)>& run) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(run, i);
  for (auto& thread : threads) thread.join();
}

void expect_right(const Problem& p, const Values& output) {
  const auto& s = p.shape;
  for (int64_t i = 0; i < static_cast<int64_t>(output.size()); ++i) {
    const int64_t pixel = i / s.k;
    const double right = expected(p, pixel / (s.p * s.q), pixel / s.q % s.p, pixel % s.q, i % s.k);
    const double off = std::abs(output[i] - right);
    if (off <= 1e-4 * (1 + std::sqrt(static_cast<double>(s.taps() * s.c)))) continue;
    std::fprintf(stderr, "%s: output %lld is %g, expected %g\n", name_of(p.algorithm),
                 static_cast<long long>(i), output[i], right);
    std::exit(1);
  }
}

void check(const Problem& p) {
  const auto& s = p.shape;
  const int64_t panel = AVX2::direct_conv_kernel<float>().panel;
  const Values weight = packed(p, panel);
  const auto jobs = plan_jobs(s, p.algorithm, panel, kThreads);
  const auto operands = [&](Values& output) {
    return ConvOperands<float>{p.input.data(), weight.data(),
                               p.bias.data(),  p.residual ? p.added.data() : nullptr,
                               output.data(),  p.relu};
  };
  // The jobs of one convolution, spread over the threads.
  Values shared(s.pixels() * s.k);
  in_threads([&](int thread) {
    for (int64_t job = thread; job < jobs.count(); job += kThreads) {
      run_job(p, operands(shared), jobs, jobs.at(job, job + 1), panel);
    }
  });
  expect_right(p, shared);
  // Whole convolutions, one a thread.
  in_threads([&](int) {
    Values own(s.pixels() * s.k);
    for (int64_t job = 0; job < jobs.count(); ++job) {
      run_job(p, operands(own), jobs, jobs.at(job, jobs.count()), panel);
    }
    if (own != shared) std::exit(1);
  });
}

// Threads that no panel is left for take some of the tiles, unless those are few.
void expect_shared_out() {
  const auto jobs = [](int64_t size, int64_t k, int64_t threads) {
    const auto shape = make_shape(1, size, size, 16, k, 3, 1, 1, 1);
    return plan_jobs(shape, ConvAlgorithm::kWinograd4, /*panel=*/16, threads).count();
  };
  if (jobs(16, 16, 2) == 2 && jobs(16, 32, 2) == 2 && jobs(16, 32, 4) == 4 && jobs(8, 16, 2) == 1) {
    return;
  }
  std::fprintf(stderr, "plan_jobs: threads are left without a job, or get too small a one\n");
  std::exit(1);
}

// What comes after a thread's last job is nobody's to fetch.
void expect_coming_of_the_same_thread() {
  const ConvJobs jobs{/*rows=*/40, /*blocks=*/4, /*panels=*/6, /*splits=*/2};
  const auto is = [](Range coming, int64_t begin, int64_t end) {
    return coming.begin == begin && coming.end == end;
  };
  if (is(jobs.at(0, 4).coming, 0, 0) && is(jobs.at(1, 4).coming, 10, 20) &&
      is(jobs.at(3, 4).coming, 0, 0) && is(jobs.at(3, 8).coming, 20, 30)) {
    return;
  }
  std::fprintf(stderr, "ConvJobs::at: rows are coming that another thread computes\n");
  std::exit(1);
}

}  // namespace

int main() {
  using enum ConvAlgorithm;
  expect_shared_out();
  expect_coming_of_the_same_thread();
  const ConvShape winograd[] = {
      make_shape(1, 7, 7, 32, 32, 3, 1, 1, 1), make_shape(2, 9, 14, 17, 35, 3, 1, 1, 1),
      make_shape(1, 3, 3, 1, 1, 3, 1, 0, 1), make_shape(3, 5, 6, 40, 7, 3, 1, 2, 1),
      make_shape(1, 16, 16, 16, 80, 3, 1, 1, 1)};
  const ConvShape direct[] = {
      make_shape(2, 7, 9, 48, 33, 1, 1, 0, 1), make_shape(1, 17, 17, 3, 20, 7, 2, 3, 1),
      make_shape(1, 9, 8, 16, 16, 3, 2, 1, 1), make_shape(1, 11, 11, 5, 9, 3, 1, 2, 2),
      make_shape(1, 6, 6, 8, 8, 1, 3, 0, 1),   make_shape(1, 1, 1, 64, 64, 1, 1, 0, 1)};
  const ConvShape strided[] = {
      make_shape(2, 15, 14, 17, 35, 3, 2, 1, 1), make_shape(1, 16, 16, 48, 33, 3, 2, 1, 1),
      make_shape(1, 23, 21, 3, 40, 7, 2, 3, 1), make_shape(1, 13, 13, 20, 9, 7, 2, 3, 1)};
  const ConvShape grouped[] = {
      make_shape(2, 17, 9, 24, 24, 3, 1, 1, 1, 6), make_shape(1, 9, 8, 9, 9, 3, 2, 1, 1, 3),
      make_shape(1, 6, 7, 32, 64, 3, 1, 2, 2, 2), make_shape(1, 5, 5, 10, 20, 1, 1, 0, 1, 5)};
  for (const bool epilogue : {false, true}) {
    for (const auto& shape : winograd) {
      for (const auto algorithm : {kDirect, kWinograd2, kWinograd4, kWinograd4Plain}) {
        check(make_problem(shape, algorithm, epilogue));
      }
    }
    for (const auto& shape : strided) {
      check(make_problem(shape, kPolyphase, epilogue));
      if (shape.r == 3) check(make_problem(shape, kPolyphasePlain, epilogue));
    }
    for (const auto& shape : grouped) check(make_problem(shape, kGrouped, epilogue));
    for (const auto& shape : direct) check(make_problem(shape, kDirect, epilogue));
  }
  std::puts("conv: right");
}
