// What forward and backward of bn_relu share inside the kernels.
#pragma once

#include "bn_relu.h"
#include "lanes.h"

namespace fastres::cpu::CPU_CAPABILITY {

// Backward recomputes the output of forward to mask by it: one function, so the bits agree.
template <typename T>
FASTRES_INLINE Lanes<T> normalise(const Lanes<T>& centred, const Lanes<T>& scale,
                                  const Lanes<T>& shift) {
  return fma(centred, scale, shift);
}

// The largest accumulated value that is zero once rounded to T: forward stored a zero for it.
template <typename T>
constexpr acc_t<T> kRoundsToZero = std::is_same_v<T, c10::Half>       ? 0x1p-25f
                                   : std::is_same_v<T, c10::BFloat16> ? 0x1p-134f
                                                                      : 0;

// A per-channel coefficient along a run: in a plane it is constant, in a row every lane has its
// own.
template <typename T, bool kPlane>
class Coefficient {
 public:
  explicit Coefficient(const acc_t<T>* p) : p_(p) {
    if constexpr (kPlane) value_ = Lanes<T>(p != nullptr ? *p : 0);
  }

  FASTRES_INLINE Lanes<T> at(int64_t i) const {
    if constexpr (kPlane) {
      return value_;
    } else {
      return Lanes<T>::load_wide(p_ + i);
    }
  }

 private:
  const acc_t<T>* p_;
  Lanes<T> value_;
};

// Calls f(index into the arrays, index into the run, lanes in use) over all runs.
template <typename T, typename F>
FASTRES_INLINE void for_each_lanes(const Runs& runs, const F& f) {
  constexpr int64_t kSize = Lanes<T>::kSize;
  for (int64_t r = 0; r < runs.count; ++r) {
    const int64_t base = r * runs.stride;
    int64_t i = 0;
    for (; i + kSize <= runs.size; i += kSize) f(base + i, i, kSize);
    if (i < runs.size) f(base + i, i, runs.size - i);
  }
}

// Stores lanes of a run, around the cache where the run says so and the vector is a whole one.
template <typename T>
FASTRES_INLINE void store(const Lanes<T>& lanes, const Runs& runs, T* p, int64_t count) {
  if (runs.stream && count == Lanes<T>::kSize) {
    lanes.stream(p);
  } else {
    lanes.store(p, count);
  }
}

// Streamed stores are not ordered like others: this makes them visible before what follows.
inline void fence(const Runs& runs) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if (runs.stream) _mm_sfence();
#else
  static_cast<void>(runs);
#endif
}

// Column blocks of a row reduction: as many accumulators as the registers hold.
template <typename T>
constexpr int kColumnBlock = (sizeof(at::vec::Vectorized<float>) == 64 ? 4 : 2) / Lanes<T>::kVecs;

// Rows that are reduced in fp32 before they are added up in fp64: a function of the width alone, so
// that results do not depend on the number of threads. A chunk is read twice and fits the L1 cache.
inline int64_t rows_per_chunk(int64_t width) { return std::max<int64_t>(8, 8192 / width); }

// Pixels of a plane that are reduced in fp32 before they are added up in fp64.
constexpr int64_t kPlaneChunk = 4096;

// Calls f(runs, first element) for chunks of about kPlaneChunk values: parts of one large plane, or
// several small planes.
template <typename F>
inline void for_each_plane_chunk(const Runs& planes, const F& f) {
  const int64_t group = std::max<int64_t>(1, kPlaneChunk / std::max<int64_t>(1, planes.size));
  for (int64_t p = 0; p < planes.count; p += group) {
    const int64_t count = std::min(group, planes.count - p);
    for (int64_t i = 0; i < planes.size; i += kPlaneChunk) {
      f(Runs{count, std::min(kPlaneChunk, planes.size - i), planes.stride, planes.stream},
        p * planes.stride + i);
    }
  }
}

}  // namespace fastres::cpu::CPU_CAPABILITY
