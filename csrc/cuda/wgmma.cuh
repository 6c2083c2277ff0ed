// wgmma: a warpgroup's products of matrices in shared memory, accumulated in its registers.
//
// d (64 x N) += a (64 x 16) * b (N x 16)^T; the rows of a and b lie in memory or, transposed, their
// columns. Thread t holds of d the rows t / 32 * 16 + t % 32 / 4 +
// 8h and the columns 8j + t % 4 * 2 + e, in d[4j + 2h + e].
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastres::cuda {

// Before the first product, and after registers of d were touched.
__device__ inline void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ inline void mma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all but the last N groups are done.
template <int N>
__device__ inline void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving accumulators while products are under way.
template <int N>
__device__ inline void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <typename T, int N, bool kTransposed>
struct Mma;

// %0 ... %(N / 2 - 1), and the accumulators that they stand for
#define FASTRES_TEN(t)                                                                             \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9"
#define FASTRES_NAMES_32 FASTRES_TEN() "," FASTRES_TEN(1) "," FASTRES_TEN(2) ", %30, %31"
#define FASTRES_NAMES_64                                                                       \
  FASTRES_TEN()                                                                                \
  "," FASTRES_TEN(1) "," FASTRES_TEN(2) "," FASTRES_TEN(3) "," FASTRES_TEN(4) "," FASTRES_TEN( \
      5) ", %60, %61, %62, %63"
#define FASTRES_NAMES_128 \
  FASTRES_TEN() "," FASTRES_TEN(1) "," FASTRES_TEN(2) "," FASTRES_TEN(3) "," FASTRES_TEN(4)   \
  "," FASTRES_TEN(5) "," FASTRES_TEN(6) "," FASTRES_TEN(7) "," FASTRES_TEN(8) "," FASTRES_TEN( \
      9) "," FASTRES_TEN(10) "," FASTRES_TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTRES_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTRES_D16(i) FASTRES_D4(i), FASTRES_D4(i + 4), FASTRES_D4(i + 8), FASTRES_D4(i + 12)
#define FASTRES_D32(i) FASTRES_D16(i), FASTRES_D16(i + 16)
#define FASTRES_D64(i) FASTRES_D32(i), FASTRES_D32(i + 32)
#define FASTRES_D128(i) FASTRES_D64(i), FASTRES_D64(i + 64)

// A, B and ADD are the numbers of the operands behind them.
#define FASTRES_MMA(TYPE, NAME, N, TURN, HALF, A, B, ADD)                                      \
  template <>                                                                                  \
  struct Mma<TYPE, N, TURN> {                                                                  \
    static __device__ void run(float (&d)[HALF], uint64_t a, uint64_t b, int add) {            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD                                   \
                   ", 0;\n"                                                                    \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME             \
                   " {" FASTRES_NAMES_##HALF "}, %" #A ", %" #B ", p, 1, 1, " #TURN ", " #TURN \
                                             ";\n}"                                            \
                   : FASTRES_D##HALF(0)                                                        \
                   : "l"(a), "l"(b), "r"(add));                                                \
    }                                                                                          \
  };

FASTRES_MMA(__nv_bfloat16, "bf16", 64, 0, 32, 32, 33, 34)
FASTRES_MMA(__nv_bfloat16, "bf16", 64, 1, 32, 32, 33, 34)
FASTRES_MMA(__nv_bfloat16, "bf16", 128, 0, 64, 64, 65, 66)
FASTRES_MMA(__nv_bfloat16, "bf16", 128, 1, 64, 64, 65, 66)
FASTRES_MMA(__nv_bfloat16, "bf16", 256, 0, 128, 128, 129, 130)
FASTRES_MMA(__nv_bfloat16, "bf16", 256, 1, 128, 128, 129, 130)
FASTRES_MMA(__half, "f16", 64, 0, 32, 32, 33, 34)
FASTRES_MMA(__half, "f16", 64, 1, 32, 32, 33, 34)
FASTRES_MMA(__half, "f16", 128, 0, 64, 64, 65, 66)
FASTRES_MMA(__half, "f16", 128, 1, 64, 64, 65, 66)
FASTRES_MMA(__half, "f16", 256, 0, 128, 128, 129, 130)
FASTRES_MMA(__half, "f16", 256, 1, 128, 128, 129, 130)

#undef FASTRES_MMA

// d += a * b^T, or d = a * b^T where `add` is 0; a and b: descriptors of operands in shared memory.
template <typename T, bool kTransposed, int HALF>
__device__ inline void mma(float (&d)[HALF], uint64_t a, uint64_t b, int add) {
  Mma<T, 2 * HALF, kTransposed>::run(d, a, b, add);
}

}  // namespace fastres::cuda
