#include <c10/util/BFloat16.h>

#include <bit>
#include <cstring>

#include "conv_grouped.h"
#include "conv_kernels.h"
#include "conv_tile.h"
#include "winograd.h"

namespace fastres::cpu::CPU_CAPABILITY {
namespace {

// One tap of the filters of a panel, at one input channel.
inline void load_tap(const FilterView& f, int64_t panel, int64_t offset, double* out) {
  const int64_t first = panel * kPanel, count = std::min(kPanel, f.k - first);
  const float* p = f.data + first * f.k_stride + offset;
  for (int64_t k = 0; k < count; ++k, p += f.k_stride) out[k] = *p;
  std::fill(out + count, out + kPanel, 0.0);
}

inline void store_row(const double* in, float* out) {
  for (int64_t k = 0; k < kPanel; ++k) out[k] = static_cast<float>(in[k]);
}

void pack_direct(const FilterView& f, Range panels, float* out) {
  const int64_t values = f.r * f.s * f.c, padded = round_up(values, kChunk);
  double row[kPanel];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float* to = out + panel * padded * kPanel;
    for (int64_t r = 0; r < f.r; ++r) {
      for (int64_t s = 0; s < f.s; ++s) {
        for (int64_t c = 0; c < f.c; ++c, to += kPanel) {
          load_tap(f, panel, r * f.r_stride + s * f.s_stride + c * f.c_stride, row);
          store_row(row, to);
        }
      }
    }
    std::fill(to, to + (padded - values) * kPanel, 0.0f);
  }
}

// The lower half of a word is the first channel of a pair.
inline uint32_t bits_of_pair(float first, float second) {
  return uint32_t{c10::BFloat16(first).x} | uint32_t{c10::BFloat16(second).x} << 16;
}

inline void store_pairs(const double* first, const double* second, float* out) {
  for (int64_t k = 0; k < kPanel; ++k) {
    const uint32_t word = bits_of_pair(static_cast<float>(first[k]), static_cast<float>(second[k]));
    std::memcpy(out + k, &word, sizeof(word));
  }
}

void pack_direct_bf16(const FilterView& f, Range panels, float* out) {
  const int64_t pairs = f.r * f.s * f.c / 2, padded = round_up(pairs, kChunk);
  double first[kPanel], second[kPanel];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float* to = out + panel * padded * kPanel;
    for (int64_t r = 0; r < f.r; ++r) {
      for (int64_t s = 0; s < f.s; ++s) {
        for (int64_t c = 0; c < f.c; c += 2, to += kPanel) {
          const int64_t offset = r * f.r_stride + s * f.s_stride + c * f.c_stride;
          load_tap(f, panel, offset, first);
          load_tap(f, panel, offset + f.c_stride, second);
          store_pairs(first, second, to);
        }
      }
    }
    std::fill(to, to + (padded - pairs) * kPanel, 0.0f);
  }
}

// Calls f(lane, its filter's value) at the first tap of one step, of `kInputs` channels a lane.
template <int kInputs, typename F>
void for_each_lane(const FilterView& f, const GroupedForm& form, int64_t panel, int64_t step,
                   const F& call) {
  const Range outputs = form.outputs_of(panel);
  for (int64_t lane = 0; lane < outputs.size(); ++lane) {
    const int64_t group = (outputs.begin + lane) / f.k;
    const auto [k, c] = form.product((outputs.begin + lane) % f.k, step);
    call(lane, f.data + group * f.group_stride + k * f.k_stride + c * kInputs * f.c_stride);
  }
}

// A lane holds bits(p) of `kInputs` neighbouring inputs, the first of which is at p.
template <int kInputs, typename Bits>
void pack_grouped(const FilterView& f, Range panels, float* out, const Bits& bits) {
  const GroupedForm form(f.groups, f.c / kInputs, f.k, kVec);
  const int64_t taps = f.r * f.s, size = form.packed_panel(taps);
  std::fill_n(out + panels.begin * size, panels.size() * size, 0.0f);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t step = 0; step < form.inputs; ++step) {
      float* const to = out + panel * size + step * taps * form.panel();
      for_each_lane<kInputs>(f, form, panel, step, [&](int64_t lane, const float* p) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          const uint32_t word = bits(p + tap / f.s * f.r_stride + tap % f.s * f.s_stride);
          std::memcpy(to + tap * form.panel() + lane, &word, sizeof(word));
        }
      });
    }
  }
}

void pack_grouped_float(const FilterView& f, Range panels, float* out) {
  pack_grouped<1>(f, panels, out, [](const float* p) { return std::bit_cast<uint32_t>(*p); });
}

void pack_grouped_bf16(const FilterView& f, Range panels, float* out) {
  pack_grouped<2>(f, panels, out,
                  [&](const float* p) { return bits_of_pair(p[0], p[f.c_stride]); });
}

// out = G in, for `columns` rows of a panel each; rows of `in` lie `columns` apart.
template <int m, int r, int columns>
inline void transform(const double (&in)[r * columns][kPanel],
                      double (&out)[(m + r - 1) * columns][kPanel]) {
  const auto& g = Winograd<m, r>::kFilter;
  for (int i = 0; i < m + r - 1; ++i) {
    for (int j = 0; j < columns; ++j) {
      for (int64_t k = 0; k < kPanel; ++k) {
        double sum = g[i][0] * in[j][k];
        for (int tap = 1; tap < r; ++tap) sum += g[i][tap] * in[tap * columns + j][k];
        out[i * columns + j][k] = sum;
      }
    }
  }
}

// G g G^T of a channel, the columns before the rows: transposed. At stride 2 of the taps at one
// phase, zeros behind the last.
template <int m, int r, int stride>
void transform_filters(const FilterView& f, int64_t panel, int64_t c, int row_phase,
                       int column_phase, double (&out)[(m + r - 1) * (m + r - 1)][kPanel]) {
  constexpr int kIn = m + r - 1;
  double taps[r * r][kPanel], half[kIn * r][kPanel], turned[r * kIn][kPanel];
  for (int y = 0; y < r; ++y) {
    for (int x = 0; x < r; ++x) {
      const int64_t row = y * stride + row_phase, column = x * stride + column_phase;
      double* const tap = taps[y * r + x];
      if (row < f.r && column < f.s) {
        load_tap(f, panel, row * f.r_stride + column * f.s_stride + c * f.c_stride, tap);
      } else {
        std::fill_n(tap, kPanel, 0.0);
      }
    }
  }
  transform<m, r, r>(taps, half);
  for (int i = 0; i < kIn; ++i) {
    for (int x = 0; x < r; ++x) std::copy_n(half[i * r + x], kPanel, turned[x * kIn + i]);
  }
  transform<m, r, kIn>(turned, out);
}

// Rounded once.
template <int m, int r, int stride>
void pack_winograd(const FilterView& f, Range panels, float* out) {
  constexpr WinogradForm kForm{m, r, stride};
  constexpr int kIn = m + r - 1;
  const int64_t size = kForm.depth(f.c) * kPanel;
  const int64_t channels = kForm.shares_chunk(f.c) ? f.c : round_up(f.c, kChunk);
  double whole[kIn * kIn][kPanel];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    if (channels != f.c) std::fill_n(out + panel * size, size, 0.0f);
    for (int phase = 0; phase < stride * stride; ++phase) {
      const int row_phase = phase / stride, column_phase = phase % stride;
      for (int64_t c = 0; c < f.c; ++c) {
        transform_filters<m, r, stride>(f, panel, c, row_phase, column_phase, whole);
        float* to = out + panel * size;
        for (int i = 0; i < kIn * kIn; ++i) {
          const int y = i / kIn, x = i % kIn;
          const bool shared = kForm.shares_chunk(f.c);
          const int64_t rows = shared ? stride : kForm.phases(y);
          const int64_t columns = shared ? stride : kForm.phases(x);
          if (row_phase < rows && column_phase < columns) {
            store_row(whole[x * kIn + y],
                      to + ((row_phase * columns + column_phase) * channels + c) * kPanel);
          }
          to += kForm.chunks(f.c, i) * kForm.chunk_depth(f.c) * kPanel;
        }
      }
    }
  }
}

// Every tap scaled, see Winograd<m, r>::filter_at.
template <int m, int r, int stride>
void pack_plain(const FilterView& f, Range panels, float* out) {
  const auto& powers = Winograd<m, r>::kScale;
  const int64_t half = plain_depth(f.c) * kVec;
  double row[kPanel];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float* to = out + panel * 2 * half;
    std::fill_n(to, 2 * half, 0.0f);
    for (int64_t c = 0; c < f.c; ++c) {
      for (int64_t y = 0; y < f.r; ++y) {
        for (int64_t x = 0; x < f.s; ++x, to += kVec) {
          load_tap(f, panel, y * f.r_stride + x * f.s_stride + c * f.c_stride, row);
          const double scale = double{powers[y / stride]} * powers[x / stride];
          for (int64_t k = 0; k < kPanel; ++k) {
            to[k / kVec * half + k % kVec] = static_cast<float>(row[k] * scale);
          }
        }
      }
    }
  }
}

}  // namespace

template <typename T>
PackKernels<T> pack_kernels() {
  return {&pack_direct,           &pack_direct_bf16,       &pack_grouped_float,
          &pack_grouped_bf16,     &pack_winograd<2, 3, 1>, &pack_winograd<4, 3, 1>,
          &pack_plain<4, 3, 1>,   &pack_winograd<4, 2, 2>, &pack_plain<4, 2, 2>,
          &pack_winograd<3, 4, 2>};
}

template PackKernels<float> pack_kernels<float>();

}  // namespace fastres::cpu::CPU_CAPABILITY
