// The microkernel that all of the project's own convolutions end in: a register tile of rows
// (pixels or Winograd tiles) times a panel of output channels. Included by *_kernel.cpp only.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

#include "conv_shape.h"
#include "inline.h"

namespace fastres::cpu::CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kVec = Vec::size();
constexpr int64_t kPanel = 2 * kVec;  // output channels

// Rows of the largest tile: two accumulators each, two registers for weights, one for the row.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif

// What a tile sums up: a product of float32 values or, in the build for processors that have the
// instruction, two products of bfloat16 values, which lie in pairs where there was one value.
FASTRES_INLINE Vec multiply_add(const Vec& x, const Vec& weight, const Vec& sum) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(static_cast<__m512>(x)),
                          reinterpret_cast<__m512bh>(static_cast<__m512>(weight)));
#else
  return at::vec::fmadd(x, weight, sum);
#endif
}

// Nested, not an array: GCC keeps the members of a structure in registers, but spills arrays. Of a
// panel whose right half has no channels, that half stays zero and costs nothing.
template <int kRows, bool kBoth = true>
struct Accumulators {
  Accumulators<kRows - 1, kBoth> above;
  Vec left, right;

  FASTRES_INLINE Accumulators(const Vec& l, const Vec& r)
      : above(l, r), left(l), right(kBoth ? r : Vec(0.0f)) {}

  // a[row * kStride] times b, in every row.
  template <int64_t kStride>
  FASTRES_INLINE void add(const float* a, const Vec& b_left, const Vec& b_right) {
    above.template add<kStride>(a, b_left, b_right);
    const Vec x(a[(kRows - 1) * kStride]);
    left = multiply_add(x, b_left, left);
    if constexpr (kBoth) right = multiply_add(x, b_right, right);
  }

  template <typename F>
  FASTRES_INLINE void for_each_row(const F& f) const {
    above.for_each_row(f);
    f(kRows - 1, left, right);
  }
};

template <bool kBoth>
struct Accumulators<0, kBoth> {
  FASTRES_INLINE Accumulators(const Vec&, const Vec&) {}
  template <int64_t kStride>
  FASTRES_INLINE void add(const float*, const Vec&, const Vec&) {}

  template <typename F>
  FASTRES_INLINE void for_each_row(const F&) const {}
};

// Rows packed [chunk][row][16], from one chunk to the next `stride` values; weights [c][kPanel].
struct Panels {
  const float* rows;
  int64_t stride;
  const float* weight;
  int64_t chunks;
  const float* start;      // what the sums begin with, kPanel values
  int64_t depth = kChunk;  // values of every chunk that are in use, a multiple of kStep

  static constexpr int64_t kStep = 4;

  int64_t weights() const { return chunks * depth * kPanel; }
};

// Memory that will be needed soon, fetched into the second-level cache some lines at a time: what
// waits for memory otherwise, the gathering of rows above all, has nothing else to do.
class Prefetch {
 public:
  Prefetch() = default;

  // All of [begin, end) in the course of so many steps.
  template <typename T>
  Prefetch(const T* begin, const T* end, int64_t steps)
      : next_(reinterpret_cast<const char*>(begin)), end_(reinterpret_cast<const char*>(end)) {
    step_ = ceil_div(ceil_div(end_ - next_, kLine), steps) * kLine;
  }

  FASTRES_INLINE void step() {
    const char* const stop = std::min(next_ + step_, end_);
    for (; next_ < stop; next_ += kLine) __builtin_prefetch(next_, /*write=*/0, /*locality=*/2);
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes

  const char* next_ = nullptr;
  const char* end_ = nullptr;
  int64_t step_ = 0;
};

// The lines of one row's part of a panel, soon to be read or written.
template <bool kWrite, typename T>
FASTRES_INLINE void prefetch_panel(const T* p) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kPanel; i += kLine) __builtin_prefetch(p + i, kWrite, /*locality=*/3);
}

// Chunks that are summed up in one go. Longer sums are sums of such sums: they lose less.
constexpr int64_t kGroup = 16;

// to(row, left, right) gets the two vectors of every row's sums; Store::kBoth says whether there
// are channels in the right one. next.prefetch(row) is told of as many rows, bit by bit: memory
// that is asked for all at once makes the weights wait. `earlier` has room for the sums of a tile.
//
// Structures come by reference and are copied here, member by member, into registers. Copied by the
// caller, vector by vector, they would be read right after their members were written, which waits
// until everything written before, the last tile's outputs, is in the cache.
template <int kRows, typename Store>
__attribute__((noinline)) void multiply(const Panels& panels, const Prefetch& following,
                                        Prefetch& rows, float* earlier, const Store& to,
                                        const Store& next) {
  Panels in = panels;
  Prefetch weights = following;
  const Store store = to, coming = next;
  using Sums = Accumulators<kRows, Store::kBoth>;
  Sums sums(Vec::loadu(in.start), Vec::loadu(in.start + kVec));
  const float* b = in.weight;
  int64_t prefetched = 0;
  for (int64_t i = 0; i < in.chunks; ++i, in.rows += in.stride) {
    if (i > 0 && i % kGroup == 0) {
      sums.for_each_row([&](int64_t row, Vec left, Vec right) FASTRES_INLINED {
        float* const sum = earlier + row * kPanel;
        if (i > kGroup) left = left + Vec::loadu(sum), right = right + Vec::loadu(sum + kVec);
        left.store(sum);
        right.store(sum + kVec);
      });
      sums = Sums(Vec(0.0f), Vec(0.0f));
    }
    weights.step();
    rows.step();
    for (; prefetched * in.chunks < (i + 1) * kRows; ++prefetched) coming.prefetch(prefetched);
    for (int64_t j = 0; j < in.depth; j += Panels::kStep) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < Panels::kStep; ++k, b += kPanel) {
        sums.template add<kChunk>(in.rows + j + k, Vec::loadu(b), Vec::loadu(b + kVec));
      }
    }
  }
  if (in.chunks <= kGroup) {
    sums.for_each_row(store);
  } else {
    sums.for_each_row([&](int64_t row, Vec left, Vec right) FASTRES_INLINED {
      const float* const sum = earlier + row * kPanel;
      store(row, left + Vec::loadu(sum), right + Vec::loadu(sum + kVec));
    });
  }
}

template <int kRows = kTileRows, typename Store>
inline void multiply_rows(int64_t count, const Panels& in, const Prefetch& weights, Prefetch& rows,
                          float* earlier, const Store& store, const Store& coming) {
  if (count == kRows) {
    multiply<kRows>(in, weights, rows, earlier, store, coming);
  } else if constexpr (kRows > 1) {
    multiply_rows<kRows - 1>(count, in, weights, rows, earlier, store, coming);
  }
}

constexpr int64_t tiles_of(int64_t rows) { return ceil_div(rows, kTileRows); }

// `count` rows in tiles of nearly equal height; store(row, left, right) as above, its rows counted
// from store.from(row) on; store.next_panel() is what comes after all of them. The weights that
// follow are taken to be the next, `rows` what comes after these rows.
template <typename Store>
inline void multiply_panel(int64_t count, const Panels& in, Prefetch& rows, const Store& store) {
  const int64_t tiles = tiles_of(count);
  alignas(64) float earlier[kTileRows * kPanel];
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = count * t / tiles, height = count * (t + 1) / tiles - first;
    const float* const coming = in.weight + in.weights();
    const Prefetch weights(coming + in.weights() * t / tiles,
                           coming + in.weights() * (t + 1) / tiles, in.chunks);
    Panels tile = in;
    tile.rows += first * kChunk;
    multiply_rows(height, tile, weights, rows, earlier, store.from(first),
                  t + 1 < tiles ? store.from(first + height) : store.next_panel());
  }
}

// --- activations in memory: `count` values of T, computed with in fp32 ---

// A whole vector of bfloat16 is half a register. ATen's masked accesses of so many values would
// take several times as long.
#if defined(CPU_CAPABILITY_AVX512)
FASTRES_INLINE Vec load_whole(const c10::BFloat16* p) {
  __m512 wide;
  at::vec::cvtbf16_fp32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), wide);
  return wide;
}

FASTRES_INLINE void store_whole(const Vec& v, c10::BFloat16* p) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  const auto narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  const auto narrow = at::vec::cvtfp32_bf16(v);
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
constexpr bool kHalfRegisters = true;
#else
constexpr bool kHalfRegisters = false;
#endif

template <typename T>
constexpr bool kInHalfRegisters = kHalfRegisters && std::is_same_v<T, c10::BFloat16>;

template <typename T>
FASTRES_INLINE Vec load_vec(const T* p, int64_t count = kVec) {
  if constexpr (kInHalfRegisters<T>) {
    if (count >= kVec) return load_whole(p);
  }
  if constexpr (std::is_same_v<T, float>) {
    return count >= kVec ? Vec::loadu(p) : Vec::loadu(p, count);
  } else {  // the lower half of a register
    using Raw = at::vec::Vectorized<T>;
    return std::get<0>(at::vec::convert_to_float<T>(Raw::loadu(p, std::min(count, kVec))));
  }
}

template <typename T>
FASTRES_INLINE void store_vec(Vec v, T* p, int64_t count = kVec) {
  if constexpr (kInHalfRegisters<T>) {
    if (count >= kVec) return store_whole(v, p);
  }
  if constexpr (std::is_same_v<T, float>) {
    count >= kVec ? v.store(p) : v.store(p, static_cast<int>(count));
  } else {
    const auto raw = at::vec::convert_from_float<T>(v, Vec(0.0f));
    raw.store(p, static_cast<int>(std::min(count, kVec)));
  }
}

// What the sums of a panel begin with: the bias of its channels, zeros without one.
struct Start {
  alignas(64) float value[kPanel] = {};

  Start(const float* bias, int64_t channel, int64_t channels) {
    if (bias == nullptr) return;
    std::copy_n(bias + channel, std::min(kPanel, channels - channel), value);
  }
};

// Adds the residual and applies ReLU: NaN stays NaN.
template <typename T>
struct Finish {
  const T* residual;  // may be null
  float floor;        // 0 for ReLU, else -Inf

  FASTRES_INLINE Vec operator()(Vec v, int64_t offset, int64_t count = kVec) const {
    if (residual != nullptr) v = v + load_vec(residual + offset, count);
    return at::vec::clamp_min(v, Vec(floor));
  }
};

template <typename T>
Finish<T> finish_of(const ConvOperands<T>& operands) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  return {operands.residual, operands.relu ? 0.0f : kNone};
}

}  // namespace fastres::cpu::CPU_CAPABILITY
