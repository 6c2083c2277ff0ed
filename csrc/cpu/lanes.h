// Lanes<T>: one vector register's worth of T, held in the accumulation type (two fp32 vectors for a
// vector of bf16 or fp16). Included by *_kernel.cpp only, once per instruction set, so everything
// lives in a namespace named after it: no AVX-512 code may end up in a symbol that others share.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "activations.h"
#include "inline.h"

namespace fastres::cpu::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX2)
// ATen copies the beginning of an AVX2 vector through memory. The shorter rows are, the more of
// them end so; a 7x7 map does after six vectors.
FASTRES_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

template <typename T>
FASTRES_INLINE at::vec::Vectorized<T> load_first(const T* p, int64_t count) {
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) return _mm256_maskload_ps(p, first_lanes(count));
#endif
  return at::vec::Vectorized<T>::loadu(p, count);
}

template <typename T>
FASTRES_INLINE void store_first(const at::vec::Vectorized<T>& v, T* p, int64_t count) {
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) return _mm256_maskstore_ps(p, first_lanes(count), v);
#endif
  v.store(p, static_cast<int>(count));
}

template <typename T>
struct Lanes {
  using A = acc_t<T>;
  using V = at::vec::Vectorized<A>;
  static constexpr int kVecs = sizeof(A) / sizeof(T);
  static constexpr int64_t kVecSize = V::size();
  static constexpr int64_t kSize = kVecs * kVecSize;
  static_assert(kSize == at::vec::Vectorized<T>::size());

  V v[kVecs];

  Lanes() = default;
  explicit Lanes(A value) {
    for (auto& x : v) x = V(value);
  }

  FASTRES_INLINE static Lanes load(const T* p, int64_t count = kSize) {
    using Raw = at::vec::Vectorized<T>;
    const Raw raw = count == kSize ? Raw::loadu(p) : load_first(p, count);
    Lanes out;
    if constexpr (kVecs == 1) {
      out.v[0] = raw;
    } else {
      std::tie(out.v[0], out.v[1]) = at::vec::convert_to_float<T>(raw);
    }
    return out;
  }

  // Per-channel values: kSize of them are readable at p.
  FASTRES_INLINE static Lanes load_wide(const A* p) {
    Lanes out;
    for (int i = 0; i < kVecs; ++i) out.v[i] = V::loadu(p + i * kVecSize);
    return out;
  }

  FASTRES_INLINE void store(T* p, int64_t count = kSize) const {
    if constexpr (kVecs == 1) {
      count == kSize ? v[0].store(p) : store_first(v[0], p, count);
    } else {
      const auto raw = at::vec::convert_from_float<T>(v[0], v[1]);
      count == kSize ? raw.store(p) : store_first(raw, p, count);
    }
  }

  // Writes all lanes around the cache, to an address that is a multiple of their size.
  FASTRES_INLINE void stream(T* p) const {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    alignas(64) T raw[kSize];
    store(raw);
#if defined(CPU_CAPABILITY_AVX512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_load_si512(raw));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(raw)));
#endif
#else
    store(p);
#endif
  }

  FASTRES_INLINE void store_wide(A* p) const {
    for (int i = 0; i < kVecs; ++i) v[i].store(p + i * kVecSize);
  }

  // The first `count` lanes of this, zero beyond them.
  Lanes keep(int64_t count) const {
    Lanes out;
    for (int i = 0; i < kVecs; ++i) {
      const auto index = V::arange(static_cast<A>(i * kVecSize), A(1));
      out.v[i] = V::blendv(V(0), v[i], index < V(static_cast<A>(count)));
    }
    return out;
  }

  A sum() const {
    V total = v[0];
    for (int i = 1; i < kVecs; ++i) total = total + v[i];
    return at::vec::vec_reduce_all<A>([](V& x, V& y) { return x + y; }, total);
  }
};

template <typename T, typename F, typename... Args>
FASTRES_INLINE Lanes<T> lanewise(const F& f, const Args&... args) {
  Lanes<T> out;
  for (int i = 0; i < Lanes<T>::kVecs; ++i) out.v[i] = f(args.v[i]...);
  return out;
}

template <typename T>
FASTRES_INLINE Lanes<T> operator+(const Lanes<T>& a, const Lanes<T>& b) {
  return lanewise<T>([](const auto& x, const auto& y) { return x + y; }, a, b);
}

template <typename T>
FASTRES_INLINE Lanes<T> operator-(const Lanes<T>& a, const Lanes<T>& b) {
  return lanewise<T>([](const auto& x, const auto& y) { return x - y; }, a, b);
}

template <typename T>
FASTRES_INLINE Lanes<T> operator*(const Lanes<T>& a, const Lanes<T>& b) {
  return lanewise<T>([](const auto& x, const auto& y) { return x * y; }, a, b);
}

// a * b + c
template <typename T>
FASTRES_INLINE Lanes<T> fma(const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& c) {
  return lanewise<T>(
      [](const auto& x, const auto& y, const auto& z) { return at::vec::fmadd(x, y, z); }, a, b, c);
}

// max(x, 0); NaN stays NaN.
template <typename T>
FASTRES_INLINE Lanes<T> relu(const Lanes<T>& a) {
  using V = typename Lanes<T>::V;
  return lanewise<T>([](const auto& x) { return at::vec::clamp_min(x, V(0)); }, a);
}

// g where !(y <= limit), else 0: like ATen's threshold_backward, NaN in y lets the gradient pass.
template <typename T>
FASTRES_INLINE Lanes<T> relu_mask(const Lanes<T>& g, const Lanes<T>& y, acc_t<T> limit) {
  using V = typename Lanes<T>::V;
  return lanewise<T>(
      [&](const auto& a, const auto& b) { return V::blendv(a, V(0), b <= V(limit)); }, g, y);
}

}  // namespace fastres::cpu::CPU_CAPABILITY
