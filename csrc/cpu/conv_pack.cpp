#include "conv_pack.h"

#include <ATen/Parallel.h>

#include <utility>

#include "conv_grouped.h"
#include "conv_kernels.h"
#include "conv_run.h"

namespace fastres::cpu {

namespace {

GroupedForm form_of(const FilterView& f, ConvAlgorithm algorithm) {
  return {f.groups, f.c / channels_a_lane(algorithm), f.k, conv_panel() / 2};
}

}  // namespace

FilterView filters_of(const at::Tensor& w, int64_t groups) {
  const int64_t k = w.size(0) / groups;
  return {w.const_data_ptr<float>(),
          k,
          w.size(1),
          w.size(2),
          w.size(3),
          w.stride(0),
          w.stride(1),
          w.stride(2),
          w.stride(3),
          groups,
          k * w.stride(0)};
}

FilterView turned(FilterView f) {
  f.data += (f.r - 1) * f.r_stride + (f.s - 1) * f.s_stride;
  f.r_stride = -f.r_stride;
  f.s_stride = -f.s_stride;
  std::swap(f.k, f.c);
  std::swap(f.k_stride, f.c_stride);
  return f;
}

int64_t packed_values(const FilterView& filters, ConvAlgorithm algorithm) {
  if (is_plain(algorithm)) {
    return round_up(filters.k, conv_panel()) * plain_depth(filters.c);
  }
  if (is_winograd(algorithm)) {
    return round_up(filters.k, conv_panel()) * winograd_form(algorithm, filters.r).depth(filters.c);
  }
  if (is_grouped(algorithm)) {
    const auto form = form_of(filters, algorithm);
    return form.panels() * form.packed_panel(filters.r * filters.s);
  }
  const int64_t c = filters.c / channels_a_lane(algorithm);
  const int64_t values = round_up(filters.r * filters.s * c, kChunk);
  return round_up(filters.k, conv_panel()) * values;
}

void pack_filters(const FilterView& filters, ConvAlgorithm algorithm, float* out) {
  using enum ConvAlgorithm;
  static const auto kernels = FASTRES_SELECT_VECTOR_KERNELS(pack_kernels, float);
  PackJob* const pack = algorithm == kDirect           ? kernels.direct
                        : algorithm == kDirectBf16     ? kernels.direct_bf16
                        : algorithm == kGrouped        ? kernels.grouped
                        : algorithm == kGroupedBf16    ? kernels.grouped_bf16
                        : algorithm == kWinograd2      ? kernels.f2
                        : algorithm == kWinograd4      ? kernels.f4
                        : algorithm == kWinograd4Plain ? kernels.f4_plain
                        : algorithm == kPolyphasePlain ? kernels.polyphase3_plain
                        : filters.r == 3               ? kernels.polyphase3
                                                       : kernels.polyphase7;
  const int64_t panels = is_grouped(algorithm) ? form_of(filters, algorithm).panels()
                                               : ceil_div(filters.k, conv_panel());
  at::parallel_for(0, panels, 1,
                   [&](int64_t begin, int64_t end) { pack(filters, {begin, end}, out); });
}

}  // namespace fastres::cpu
