// The instructions of sm_80 and later that the portable convolution is made of (PTX ISA 7.0,
// sections on cp.async, ldmatrix and mma.sync). The tests' emulator has functions of the same
// names.
#pragma once

#include "pack.cuh"

#if defined(FASTRES_EMULATOR)
#include "emulated_sm80.h"
#else

namespace fastres::cuda {

// Sixteen bytes from global to shared memory, some time later; zeros where there is nothing to
// read.
__device__ inline void copy_later(void* to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last N groups of this thread.
template <int N>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit values: lane l says where row l % 8 of matrix l / 8 begins, and
// gets of every matrix the values 2 * (l % 4) and the next of row l / 4.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// d (16 x 8) += a (16 x 16) * b (8 x 16)^T. Lane l has of d the rows l / 4 + 8h and the columns
// l % 4 * 2 + e, in d[2h + e]; a: the matrices of rows 0 and 8, then those 8 columns further; b:
// the matrices of columns 0 and 8.
template <typename T>
__device__ inline void multiply_add(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ inline char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) char portable_memory[];
  return portable_memory;
}

}  // namespace fastres::cuda
#endif
