// F(4x4, 3x3) and its polyphase form for few tiles: 3x3 filters come from memory as they are, a
// quarter and a ninth of what they are transformed, and are transformed in registers, row by row of
// positions, as they are multiplied, four tiles at a time. On Zen 4 that takes a third longer than
// with transformed filters at hand, and is worth it where filters are read for so few tiles that
// memory is what they wait for. Included by *_kernel.cpp only.
#pragma once

#include "conv_winograd.h"

namespace fastres::cpu::CPU_CAPABILITY {

// Tiles that are multiplied together: a sum at six positions each, four registers for filters.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kPlainTiles = 4;
#else
constexpr int kPlainTiles = 2;
#endif

// Chunks of channels whose filters stay in the first-level cache until every tile has met them.
constexpr int64_t kPlainChunks = 2;

constexpr int64_t kTaps = 9;

// One vector of sums a tile. Nested for the reason that Accumulators are.
template <int kTiles>
struct TileSums {
  TileSums<kTiles - 1> before;
  Vec sum{0.0f};

  FASTRES_INLINE void add(const float* rows, const Vec& filter) {
    before.add(rows, filter);
    sum = at::vec::fmadd(Vec(rows[(kTiles - 1) * kChunk]), filter, sum);
  }

  FASTRES_INLINE void add_to(float* sums, const Vec& scale, bool first) const {
    before.add_to(sums, scale, first);
    float* const to = sums + (kTiles - 1) * kPanel;
    at::vec::fmadd(sum, scale, first ? Vec(0.0f) : Vec::loadu(to)).store(to);
  }
};

template <>
struct TileSums<0> {
  FASTRES_INLINE void add(const float*, const Vec&) {}
  FASTRES_INLINE void add_to(float*, const Vec&, bool) const {}
};

// Those of a row of positions. The last but one is missing from narrow tiles, which come last: only
// the first kWide have it.
template <int kIn, int kTiles, int kWide, int kPlace = 0>
struct RowSums {
  TileSums<kPlace == kIn - 2 ? kWide : kTiles> here;
  RowSums<kIn, kTiles, kWide, kPlace + 1> after;

  // f<place>(sums)
  template <typename F>
  FASTRES_INLINE void for_each(const F& f) {
    f.template operator()<kPlace>(here);
    after.for_each(f);
  }
};

template <int kIn, int kTiles, int kWide>
struct RowSums<kIn, kTiles, kWide, kIn> {
  template <typename F>
  FASTRES_INLINE void for_each(const F&) {}
};

// A row of positions of neighbouring tiles, some chunks of their channels.
struct PlainRow {
  const float* rows;
  int64_t position_stride, phase_stride, chunk_stride;
  const float* filters;  // [channel][tap][kVec], see Winograd<m, r>::filter_at
  int64_t chunks;
  float* sums;
  int64_t sums_stride;
  bool first;   // of the chunks: nothing is in `sums` yet
  bool adding;  // see Winograd<m, r>::filter_at
};

// At one phase and one chunk of channels.
template <typename Form, int kPoint, bool kAdding, int kRowPhase, int kColumnPhase, typename Sums>
FASTRES_INLINE void multiply_phase(const PlainRow& in, const float* rows, const float* filter,
                                   Prefetch& coming, Sums& sums) {
  constexpr int kStride = Form::kStride;
  constexpr auto taps_at = [](int phase) { return (2 - phase) / kStride + 1; };
  for (int64_t c = 0; c < kChunk; ++c, filter += kTaps * kVec) {
    coming.step();
    const auto column = [&](int s) FASTRES_INLINED {
      constexpr int kRows = taps_at(kRowPhase);
      return Form::W::template filter_at<kPoint, kRows, kAdding>([&](int r) FASTRES_INLINED {
        const int tap = (r * kStride + kRowPhase) * 3 + s * kStride + kColumnPhase;
        return Vec::loadu(filter + tap * kVec);
      });
    };
    constexpr int kColumns = taps_at(kColumnPhase);
    const Vec first = column(0), second = column(kColumns > 1 ? 1 : 0),
              third = column(kColumns > 2 ? 2 : 0);
    const auto columns = [&](int s) FASTRES_INLINED {
      return s == 0 ? first : s == 1 ? second : third;
    };
    sums.for_each([&]<int place>(auto& here) FASTRES_INLINED {
      constexpr bool kLast = place + 1 == Form::kIn;
      if constexpr (kStride == 1 || kColumnPhase == 0 || !kLast) {
        constexpr int kPhase = kRowPhase * (kLast ? 1 : kStride) + kColumnPhase;
        here.add(rows + place * in.position_stride + kPhase * in.phase_stride + c,
                 Form::W::template filter_at<place, kColumns, kAdding>(columns));
      }
    });
  }
}

template <typename Form, int kPoint, int kTiles, int kWide, bool kAdding = false>
__attribute__((noinline)) void multiply_row(const PlainRow& given, Prefetch& following) {
  const PlainRow in = given;
  Prefetch coming = following;
  RowSums<Form::kIn, kTiles, kWide> sums;
  const float* rows = in.rows;
  const float* filter = in.filters;
  for (int64_t i = 0; i < in.chunks; ++i) {
    multiply_phase<Form, kPoint, kAdding, 0, 0>(in, rows, filter, coming, sums);
    if constexpr (Form::kStride == 2) {
      multiply_phase<Form, kPoint, kAdding, 0, 1>(in, rows, filter, coming, sums);
      if constexpr (kPoint + 1 < Form::kIn) {
        multiply_phase<Form, kPoint, kAdding, 1, 0>(in, rows, filter, coming, sums);
        multiply_phase<Form, kPoint, kAdding, 1, 1>(in, rows, filter, coming, sums);
      }
    }
    rows += in.chunk_stride;
    filter += kChunk * kTaps * kVec;
  }
  following = coming;
  sums.for_each([&]<int place>(const auto& here) FASTRES_INLINED {
    const auto& scale = Form::W::kPlainScale;
    here.add_to(in.sums + place * in.sums_stride,
                Vec(static_cast<float>(scale[kPoint] * scale[place])), in.first);
  });
}

// Whether additions go beside multiplications that take their units two turns. On Zen 4 14x14 maps,
// all tiles by four, take 4 % less if filters are transformed by additions alone; by two tiles at a
// time, which 7x7 maps have, too, there would be more additions than time.
constexpr bool kMayAdd = kVec == 16;
inline bool adds_beside() { return kMayAdd && multiply_adds() < 2 * kVec; }

// Of `tiles` tiles the first `wide` have all positions.
template <typename Form, int kPoint, int kTiles = kPlainTiles, int kWide = kTiles>
void multiply_tiles(int64_t tiles, int64_t wide, const PlainRow& row, Prefetch& coming) {
  if (tiles == kTiles && wide == kWide) {
    if constexpr (kMayAdd && kTiles == kPlainTiles && Form::kStride == 1) {
      if (row.adding) return multiply_row<Form, kPoint, kTiles, kWide, true>(row, coming);
    }
    multiply_row<Form, kPoint, kTiles, kWide>(row, coming);
  } else if constexpr (kWide > 0) {
    if (tiles == kTiles) {
      multiply_tiles<Form, kPoint, kTiles, kWide - 1>(tiles, wide, row, coming);
    } else if constexpr (kTiles > 1) {
      multiply_tiles<Form, kPoint, kTiles - 1>(tiles, wide, row, coming);
    }
  }
}

// As TransformedFilters, for filters as they are.
template <int m, int r, int stride>
class PlainFilters {
 public:
  using W = Winograd<m, r>;
  static constexpr int kIn = m + r - 1, kStride = stride;

  template <typename T>
  PlainFilters(const ConvShape& shape, const ConvOperands<T>& operands, const WinogradGrid&,
               const JobTiles& tiles, const ConvJob&)
      : outputs_(shape.k),
        chunks_(ceil_div(shape.c, kChunk)),
        filters_(operands.weight),
        tiles_(tiles) {}

  void multiply(int64_t panel, const Positions& at) const {
    const float* filters = filters_ + panel * chunks_ * kChunk * kTaps * kPanel;
    const int64_t chunk_stride = tiles_.count * kChunk;
    for (int64_t lane = 0; lane < std::min(kPanel, outputs_ - panel * kPanel); lane += kVec) {
      for (int64_t chunk = 0; chunk < chunks_; chunk += kPlainChunks) {
        const int64_t chunks = std::min(kPlainChunks, chunks_ - chunk);
        const int64_t size = chunks * kChunk * kTaps * kVec;
        const PlainRow row{at.rows + chunk * chunk_stride,
                           at.rows_stride,
                           chunks_ * chunk_stride,
                           chunk_stride,
                           filters,
                           chunks,
                           at.sums + lane,
                           at.sums_stride,
                           chunk == 0,
                           adding_};
        filters += size;
        Prefetch coming(filters, filters + size, steps(chunks));
        multiply_rows<0>(row, coming);
      }
    }
  }

 private:
  // At least, of some chunks.
  int64_t steps(int64_t chunks) const {
    const int64_t groups = ceil_div(tiles_.count, kPlainTiles);
    return (kIn - 1) * groups * chunks * kChunk * kStride * kStride;
  }

  // From one row of positions on, every tile that has them.
  template <int kPoint>
  void multiply_rows(PlainRow row, Prefetch& coming) const {
    const bool missing = kPoint == kIn - 2;
    const Range having = tiles_.having(missing, false);
    const int64_t wide = tiles_.having(missing, true).end;
    for (int64_t tile = having.begin; tile < having.end; tile += kPlainTiles) {
      PlainRow some = row;
      some.rows += tile * kChunk;
      some.sums += tile * kPanel;
      const int64_t count = std::min<int64_t>(kPlainTiles, having.end - tile);
      multiply_tiles<PlainFilters, kPoint>(count, std::clamp(wide - tile, int64_t{0}, count), some,
                                           coming);
    }
    if constexpr (kPoint + 1 < kIn) {
      row.rows += kIn * row.position_stride;
      row.sums += kIn * row.sums_stride;
      multiply_rows<kPoint + 1>(row, coming);
    }
  }

  const int64_t outputs_, chunks_;
  const float* const filters_;
  const JobTiles& tiles_;
  const bool adding_ = adds_beside();
};

}  // namespace fastres::cpu::CPU_CAPABILITY
