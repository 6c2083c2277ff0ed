// Whether any of torch's threads met a NaN in a maximum: oneDNN's ReLU is max(x, 0) in an
// instruction that turns NaN into 0, where PyTorch's keeps it. On x86 that instruction (or the
// comparison that stands for it) raises the thread's "invalid operation" flag, so NaN can be told
// afterwards, for the price of one look at each thread. Other processors' maximum keeps NaN.
#pragma once

#include <atomic>

#ifdef FASTRES_X86
#include <immintrin.h>
#endif

namespace fastres::cpu {

// Lowers the flag on all threads and tells whether it was up on any.
inline bool take_invalid_flag() {
#ifdef FASTRES_X86
  std::atomic<bool> raised{false};
#pragma omp parallel
  {
    const unsigned state = _mm_getcsr();
    if (state & _MM_EXCEPT_INVALID) {
      _mm_setcsr(state & ~_MM_EXCEPT_INVALID);
      raised.store(true, std::memory_order_relaxed);
    }
  }
  return raised;
#else
  return false;
#endif
}

}  // namespace fastres::cpu
