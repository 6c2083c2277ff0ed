// wgrad by Winograd and directly, without PyTorch, as conv.cpp does it for the convolutions: every
// buffer has exactly the size that is documented, eight threads share the jobs. Exits with 1 where
// a gradient differs from the definition in fp64.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/conv_wgrad_direct_kernels.h"
#include "../../csrc/cpu/conv_wgrad_winograd.h"

namespace {

using namespace fastres::cpu;
using Values = std::vector<float>;

constexpr int kThreads = 8;

ConvShape make_shape(int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, int64_t padding,
                     int64_t size = 3, int64_t stride = 1) {
  const int64_t p = (h + 2 * padding - size) / stride + 1;
  const int64_t q = (w + 2 * padding - size) / stride + 1;
  return {n, h, w, c, k, size, size, p, q, {stride, stride}, {padding, padding}, {1, 1}};
}

Values random_values(int64_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Values values(count);
  for (auto& x : values) x = normal(random);
  return values;
}

// The definition, in fp64: of tap (r, t) from channel c to filter k.
double expected(const ConvShape& s, const Values& x, const Values& dy, int64_t k, int64_t r,
                int64_t t, int64_t c) {
  double sum = 0;
  for (int64_t i = 0; i < s.pixels(); ++i) {
    const int64_t n = i / (s.p * s.q);
    const int64_t h = i / s.q % s.p * s.stride[0] - s.padding[0] + r;
    const int64_t w = i % s.q * s.stride[1] - s.padding[1] + t;
    if (h < 0 || h >= s.h || w < 0 || w >= s.w) continue;
    sum += static_cast<double>(dy[i * s.k + k]) * x[((n * s.h + h) * s.w + w) * s.c + c];
  }
  return sum;
}

Values by_winograd(const ConvShape& s, int64_t m, const Values& x, const Values& dy) {
  const auto kernels = AVX2::winograd_wgrad_kernels<float>();
  const WgradParts parts(s, m);
  const int64_t size = s.k * s.taps() * s.c;
  Values gradients(parts.splits * size);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      Values scratch(WgradBuffers::values((m + 2) * (m + 2)));
      for (int64_t job = thread; job < parts.count(); job += kThreads) {
        const WgradOperands<float, float> operands{x.data(), dy.data(),
                                                   gradients.data() + parts.split_of(job) * size};
        auto* const run = m == 2 ? kernels.f2_partial : kernels.f4_partial;
        if (!run(s, operands, parts[job], scratch.data())) std::exit(1);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (int64_t i = size; i < parts.splits * size; ++i) gradients[i % size] += gradients[i];
  gradients.resize(size);
  return gradients;
}

Values directly(const ConvShape& s, const Values& x, const Values& dy) {
  const auto kernel = AVX2::direct_wgrad_kernel<float>();
  const int64_t tiles = ceil_div(s.k, kernel.tile_rows);
  const Range panels{0, ceil_div(s.taps() * s.c, kernel.panel)};
  Values gradient(s.k * s.taps() * s.c);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      Values scratch(kernel.scratch);
      kernel.run(s, dy.data(), x.data(), {0, s.pixels()}, part_of(tiles, kThreads, thread), panels,
                 scratch.data(), gradient.data());
    });
  }
  for (auto& thread : threads) thread.join();
  return gradient;
}

void check(const ConvShape& s, int64_t m) {
  const Values x = random_values(s.n * s.h * s.w * s.c), dy = random_values(s.pixels() * s.k);
  const Values gradient = m == 0 ? directly(s, x, dy) : by_winograd(s, m, x, dy);
  for (int64_t i = 0; i < static_cast<int64_t>(gradient.size()); ++i) {
    const int64_t tap = i / s.c % s.taps();
    const double right = expected(s, x, dy, i / (s.c * s.taps()), tap / s.s, tap % s.s, i % s.c);
    if (std::abs(gradient[i] - right) <= 1e-4 * std::sqrt(static_cast<double>(s.pixels())))
      continue;
    std::fprintf(stderr, "%s(%lld): value %lld is %g, expected %g\n", m == 0 ? "directly" : "F",
                 static_cast<long long>(m), static_cast<long long>(i), gradient[i], right);
    std::exit(1);
  }
}

}  // namespace

int main() {
  for (const int64_t m : {2, 4}) {
    for (const auto& shape : {make_shape(1, 7, 7, 32, 32, 1), make_shape(2, 9, 14, 17, 35, 1),
                              make_shape(1, 3, 3, 1, 1, 0), make_shape(3, 1, 2, 5, 7, 1),
                              make_shape(1, 5, 6, 70, 9, 2), make_shape(3, 21, 23, 16, 66, 1)}) {
      check(shape, m);
    }
  }
  for (const auto& shape :
       {make_shape(2, 9, 7, 16, 13, 0, 1, 1), make_shape(1, 1, 1, 8, 1, 0, 1, 1),
        make_shape(3, 12, 11, 24, 125, 1, 3, 2), make_shape(1, 5, 4, 8, 3, 2, 3, 1),
        make_shape(2, 19, 17, 16, 7, 0, 1, 2)}) {
    check(shape, 0);
  }
  std::puts("wgrad: right");
}
