// Grouped convolution, a row of the output at a time. The channels of the input that a panel reads
// are copied into padded rows, where pixels lie close together and none is missing.
#include <cstring>

#include "conv_grouped.h"
#include "conv_kernels.h"
#include "conv_tile.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

#if defined(CPU_CAPABILITY_AVX512)
using Register = __m512;
using LaneIndex = __m512i;

FASTRES_INLINE Vec permute(const Vec& v, LaneIndex from) { return _mm512_permutexvar_ps(from, v); }
#else
using Register = __m256;
using LaneIndex = __m256i;

FASTRES_INLINE Vec permute(const Vec& v, LaneIndex from) {
  return _mm256_permutevar8x32_ps(v, from);
}
#endif

// The lane that each lane is permuted from.
template <typename F>
LaneIndex lane_index(const F& from) {
  int32_t lanes[kVec];
  for (int64_t lane = 0; lane < kVec; ++lane) lanes[lane] = static_cast<int32_t>(from(lane));
  LaneIndex index;
  std::memcpy(&index, lanes, sizeof(index));
  return index;
}

// Of narrow groups.
struct Permutations {
  LaneIndex spread;  // a pixel's inputs, each to its lane
  LaneIndex above;   // sums, each one lane down

  explicit Permutations(const GroupedForm& form)
      : spread(lane_index([&](int64_t lane) {
          const int64_t group = lane / form.outputs;
          return (group * form.inputs + form.input_of(lane % form.outputs)) % kVec;
        })),
        above(lane_index([&](int64_t lane) {
          return lane - lane % form.outputs + form.lane_above(lane % form.outputs);
        })) {}
};

// How a step multiplies: narrow groups side by side...
struct NarrowLanes {
  static constexpr int64_t kVectors = 1;
  static constexpr int64_t kStep = 0;  // from a step's inputs to the next one's
  LaneIndex above;

  FASTRES_INLINE static Vec input(const float* pixel) { return Vec::loadu(pixel); }
  FASTRES_INLINE Vec moved(const Vec& sum) const { return permute(sum, above); }
};

// ... or a wide group.
template <int64_t vectors>
struct WideLanes {
  static constexpr int64_t kVectors = vectors;
  static constexpr int64_t kStep = 1;

  FASTRES_INLINE static Vec input(const float* pixel) { return Vec(*pixel); }
  FASTRES_INLINE static Vec moved(const Vec& sum) { return sum; }
};

// Stays in its register: GCC would load it again for every tap, and loads are the bottleneck.
FASTRES_INLINE Vec held(Register v) {
  asm("" : "+v"(v));
  return v;
}

// The last pixels of an output under three taps, as far as the next output meets them, too.
struct Columns {
  Vec first, second;
  const float* next;
};

// Of neighbouring outputs. Nested for the reason that Accumulators are.
template <typename Lanes, int kOutputs>
struct RowSums {
  RowSums<Lanes, kOutputs - 1> before;
  Vec sum = Vec(0.0f), second = Vec(0.0f);  // of Lanes' vectors

  FASTRES_INLINE void move(const Lanes& lanes) {
    before.move(lanes);
    sum = lanes.moved(sum);
  }

  // One tap; returns the pixel of the next output.
  FASTRES_INLINE const float* add(const float* pixel, int64_t stride, const Vec& filter,
                                  const Vec& second_filter) {
    pixel = before.add(pixel, stride, filter, second_filter);
    const Vec x = Lanes::input(pixel);
    sum = multiply_add(x, filter, sum);
    if constexpr (Lanes::kVectors == 2) second = multiply_add(x, second_filter, second);
    return pixel + stride;
  }

  // Three taps, `stride` apart, with kStride times that from output to output: an input that
  // several outputs meet is loaded once.
  template <int kStride>
  FASTRES_INLINE Columns slide(const float* pixel, int64_t stride, const Vec& left,
                               const Vec& middle, const Vec& right) {
    auto [x, y, next] = before.template slide<kStride>(pixel, stride, left, middle, right);
    if constexpr (kStride == 2) {
      y = held(Lanes::input(next));
      next += stride;
    }
    const Vec z = held(Lanes::input(next));
    sum = multiply_add(x, left, sum);
    sum = multiply_add(y, middle, sum);
    sum = multiply_add(z, right, sum);
    return {kStride == 1 ? y : z, z, next + stride};
  }

  FASTRES_INLINE float* store(float* out) const {
    out = before.store(out);
    sum.store(out);
    if constexpr (Lanes::kVectors == 2) second.store(out + kVec);
    return out + Lanes::kVectors * kVec;
  }
};

template <typename Lanes>
struct RowSums<Lanes, 0> {
  FASTRES_INLINE void move(const Lanes&) {}

  FASTRES_INLINE const float* add(const float* pixel, int64_t, const Vec&, const Vec&) {
    return pixel;
  }

  template <int kStride>
  FASTRES_INLINE Columns slide(const float* pixel, int64_t stride, const Vec&, const Vec&,
                               const Vec&) {
    const Vec x = held(Lanes::input(pixel));
    if constexpr (kStride == 2) return {x, x, pixel + stride};
    return {x, held(Lanes::input(pixel + stride)), pixel + 2 * stride};
  }

  FASTRES_INLINE float* store(float* out) const { return out; }
};

// What a tile, some neighbouring outputs of one row, reads. Strides are in values.
struct Window {
  const float* corner;                     // packed, under the first tap of the first output
  int64_t row_stride, tap_stride, stride;  // between taps, and between outputs
  int64_t rows, taps, steps;
  const float* filters;
};

// kStride: of slide(), or 0 where taps and outputs lie at other distances.
template <typename Lanes, int kStride, int kOutputs>
__attribute__((noinline)) void multiply(const Window& in, const Lanes& lanes, float* out) {
  constexpr int64_t kValues = Lanes::kVectors * kVec;
  RowSums<Lanes, kOutputs> sums;
  const float* filter = in.filters;
  for (int64_t step = 0; step < in.steps; ++step) {
    sums.move(lanes);
    const float* row = in.corner + step * Lanes::kStep;
    for (int64_t r = 0; r < in.rows; ++r, row += in.row_stride) {
      if constexpr (kStride != 0) {
        sums.template slide<kStride>(row, in.tap_stride, Vec::loadu(filter),
                                     Vec::loadu(filter + kVec), Vec::loadu(filter + 2 * kVec));
        filter += 3 * kVec;
      } else {
        const float* tap = row;
        for (int64_t s = 0; s < in.taps; ++s, tap += in.tap_stride, filter += kValues) {
          sums.add(tap, in.stride, Vec::loadu(filter), Vec::loadu(filter + kValues - kVec));
        }
      }
    }
  }
  sums.store(out);
}

template <int kStride, int kOutputs = kTileRows, typename Lanes>
void multiply_tile(int64_t outputs, const Window& in, const Lanes& lanes, float* out) {
  if (outputs == kOutputs) {
    multiply<Lanes, kStride, kOutputs>(in, lanes, out);
  } else if constexpr (kOutputs > 1) {
    multiply_tile<kStride, kOutputs - 1>(outputs, in, lanes, out);
  }
}

template <typename Lanes>
void multiply_tile(int64_t outputs, const Window& in, const Lanes& lanes, float* out) {
  if constexpr (Lanes::kVectors == 1) {  // of two, sums leave no registers for three taps
    if (in.taps == 3 && in.stride == in.tap_stride) {
      return multiply_tile<1>(outputs, in, lanes, out);
    }
    if (in.taps == 3 && in.stride == 2 * in.tap_stride) {
      return multiply_tile<2>(outputs, in, lanes, out);
    }
  }
  multiply_tile<0>(outputs, in, lanes, out);
}

// One panel at some rows of the output of one image. Rows of the input are packed when the first
// row of the output needs them; meanwhile what the next panel will read and write is fetched, which
// lies a vector further on in every pixel.
template <typename In, typename T>
class PanelOfImage {
 public:
  PanelOfImage(const ConvShape& shape, const GroupedForm& form, const Permutations& permutations,
               const ConvOperands<T>& operands, int64_t image, int64_t panel, float* packed)
      : shape_(shape),
        form_(form),
        permutations_(permutations),
        groups_(form.groups_of(panel)),
        outputs_(form.outputs_of(panel)),
        input_(reinterpret_cast<const In*>(operands.input) + image * shape.h * shape.w * shape.c +
               groups_.begin * form.inputs),
        filters_(operands.weight + panel * form.packed_panel(shape.taps())),
        output_(operands.output + outputs_.begin + image * shape.p * shape.q * shape.k),
        finish_(finish_of(operands)),
        bias_(operands.bias, outputs_.begin, shape.k),
        packed_(packed),
        row_values_(PaddedPart(shape, 1).columns * form.pixel()) {
    if (finish_.residual != nullptr) finish_.residual += output_ - operands.output;
  }

  void run(Range rows) const {
    const int64_t top = rows.begin * shape_.stride[0];
    const float* const next_filters = filters_ + form_.packed_panel(shape_.taps());
    Prefetch coming(next_filters, next_filters + (next_filters - filters_), rows.size());
    int64_t ready = 0;
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const int64_t first = p * shape_.stride[0] - top;
      for (; ready < first + (shape_.r - 1) * shape_.dilation[0] + 1; ++ready) {
        pack_row(top - shape_.padding[0] + ready, packed_ + ready * row_values_);
      }
      coming.step();
      convolve_row(p, packed_ + first * row_values_);
    }
  }

 private:
  void pack_row(int64_t y, float* to) const {
    float* const end = to + row_values_;
    if (y >= 0 && y < shape_.h) {
      const int64_t columns = row_values_ / form_.pixel(), left = shape_.padding[1];
      const int64_t begin = std::min(left, columns), stop = std::min(left + shape_.w, columns);
      to = std::fill_n(to, begin * form_.pixel(), 0.0f);
      to = pack_pixels(input_ + y * shape_.w * shape_.c, stop - begin, to);
    }
    std::fill(to, end, 0.0f);
  }

  // Writes whole vectors, over the beginning of what comes next.
  float* pack_pixels(const In* from, int64_t count, float* to) const {
    // In variables, for a vector that is stored might be anything in memory.
    const int64_t values = groups_.size() * form_.inputs, stride = shape_.c, pixel = form_.pixel();
    const LaneIndex spread = permutations_.spread;
    const bool narrow = form_.is_narrow();
    for (; count > 0; --count, from += stride, to += pixel) {
      __builtin_prefetch(from + values, /*write=*/0, /*locality=*/2);
      if (narrow) {
        permute(load_vec(from, values), spread).store(to);
        continue;
      }
      for (int64_t i = 0; i < values; i += kVec) load_vec(from + i, values - i).store(to + i);
    }
    return to;
  }

  void convolve_row(int64_t p, const float* row) const {
    if (form_.vectors() == 2) return convolve_row(p, row, WideLanes<2>{});
    if (!form_.is_narrow()) return convolve_row(p, row, WideLanes<1>{});
    convolve_row(p, row, NarrowLanes{permutations_.above});
  }

  template <typename Lanes>
  void convolve_row(int64_t p, const float* row, const Lanes& lanes) const {
    alignas(64) float sums[kTileRows * kPanel];
    const int64_t tiles = tiles_of(shape_.q), pixel = form_.pixel();
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t q = shape_.q * t / tiles, count = shape_.q * (t + 1) / tiles - q;
      const int64_t stride = shape_.stride[1] * pixel;
      const Window window{row + q * stride,
                          shape_.dilation[0] * row_values_,
                          shape_.dilation[1] * pixel,
                          stride,
                          shape_.r,
                          shape_.s,
                          form_.inputs,
                          filters_};
      multiply_tile(count, window, lanes, sums);
      store_tile<Lanes::kVectors>((p * shape_.q + q) * shape_.k, count, sums);
    }
  }

  template <int64_t kVectors>
  void store_tile(int64_t offset, int64_t count, const float* sums) const {
    const auto finish = finish_;  // in variables, as above
    const int64_t lanes = outputs_.size(), stride = shape_.k;
    T* const output = output_;
    for (int64_t v = 0; v < kVectors && v * kVec < lanes; ++v) {
      const Vec bias = Vec::loadu(bias_.value + v * kVec);
      for (int64_t o = 0; o < count; ++o) {
        const int64_t at = offset + o * stride + v * kVec, rest = lanes - v * kVec;
        __builtin_prefetch(output + at + lanes, /*write=*/1, /*locality=*/2);
        const Vec sum = Vec::loadu(sums + (o * kVectors + v) * kVec) + bias;
        store_vec(finish(sum, at, rest), output + at, rest);
      }
    }
  }

  const ConvShape& shape_;
  const GroupedForm& form_;
  const Permutations& permutations_;
  const Range groups_, outputs_;
  const In* const input_;
  const float* const filters_;
  T* const output_;
  Finish<T> finish_;
  const Start bias_;
  float* const packed_;
  const int64_t row_values_;
};

// `In` is what a lane of the input holds, in whose numbers `shape` counts its channels.
template <typename In, typename T>
void run_on(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
            float* scratch) {
  const Range rows = job.rows, panels = job.panels;
  const GroupedForm form(shape, kVec);
  const Permutations permutations(form);
  for (int64_t begin = rows.begin, end; begin < rows.end; begin = end) {
    const int64_t image = begin / shape.p, first = image * shape.p;
    end = std::min(first + shape.p, rows.end);
    for (int64_t index = panels.begin; index < panels.end; ++index) {
      const PanelOfImage<In, T> panel(shape, form, permutations, operands, image, index, scratch);
      panel.run({begin - first, end - first});
    }
  }
}

template <typename T>
void run(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
         float* scratch) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  // A pair of channels is copied as the float32 value that would lie there.
  run_on<float>(in_pairs(shape), operands, job, scratch);
#else
  run_on<T>(shape, operands, job, scratch);
#endif
}

}  // namespace

template <typename T>
GroupedConvKernel<T> grouped_conv_kernel() {
  return {&run<T>};
}

#if !defined(CPU_CAPABILITY_AVX512_BF16)
template GroupedConvKernel<float> grouped_conv_kernel<float>();
template GroupedConvKernel<c10::Half> grouped_conv_kernel<c10::Half>();
#endif
template GroupedConvKernel<c10::BFloat16> grouped_conv_kernel<c10::BFloat16>();

}  // namespace fastres::cpu::CPU_CAPABILITY
