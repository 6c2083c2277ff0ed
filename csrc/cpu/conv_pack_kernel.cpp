#include <c10/util/BFloat16.h>

#include <cstring>

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
inline void store_pairs(const double* first, const double* second, float* out) {
  const auto bits = [](double v) { return uint32_t{c10::BFloat16(static_cast<float>(v)).x}; };
  for (int64_t k = 0; k < kPanel; ++k) {
    const uint32_t word = bits(first[k]) | bits(second[k]) << 16;
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

// out = G in, for `columns` rows of a panel each; rows of `in` lie `columns` apart.
template <int m, int columns>
inline void transform(const double (&in)[3 * columns][kPanel],
                      double (&out)[(m + 2) * columns][kPanel]) {
  const auto& g = Winograd<m>::kFilter;
  for (int i = 0; i < m + 2; ++i) {
    for (int j = 0; j < columns; ++j) {
      for (int64_t k = 0; k < kPanel; ++k) {
        out[i * columns + j][k] =
            g[i][0] * in[j][k] + g[i][1] * in[columns + j][k] + g[i][2] * in[2 * columns + j][k];
      }
    }
  }
}

// G g G^T, rounded once.
template <int m>
void pack_winograd(const FilterView& f, Range panels, float* out) {
  constexpr int kIn = m + 2;
  const int64_t padded = round_up(f.c, kChunk), position = padded * kPanel;
  double taps[9][kPanel], half[kIn * 3][kPanel], turned[3 * kIn][kPanel], whole[kIn * kIn][kPanel];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float* const to = out + panel * kIn * kIn * position;
    for (int64_t c = 0; c < f.c; ++c) {
      for (int r = 0; r < 3; ++r) {
        for (int s = 0; s < 3; ++s) {
          load_tap(f, panel, r * f.r_stride + s * f.s_stride + c * f.c_stride, taps[r * 3 + s]);
        }
      }
      transform<m, 3>(taps, half);
      for (int i = 0; i < kIn; ++i) {
        for (int s = 0; s < 3; ++s) std::copy_n(half[i * 3 + s], kPanel, turned[s * kIn + i]);
      }
      transform<m, kIn>(turned, whole);  // its rows are the columns of the filter
      for (int x = 0; x < kIn; ++x) {
        for (int y = 0; y < kIn; ++y) {
          store_row(whole[x * kIn + y], to + (y * kIn + x) * position + c * kPanel);
        }
      }
    }
    for (int64_t i = 0; i < kIn * kIn; ++i) {
      std::fill(to + i * position + f.c * kPanel, to + (i + 1) * position, 0.0f);
    }
  }
}

}  // namespace

template <typename T>
PackKernels<T> pack_kernels() {
  return {&pack_direct, &pack_direct_bf16, &pack_winograd<2>, &pack_winograd<4>};
}

template PackKernels<float> pack_kernels<float>();

}  // namespace fastres::cpu::CPU_CAPABILITY
