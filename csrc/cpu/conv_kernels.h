// The project's own convolutions. A call does one job, with `scratch` for what it packs.
#pragma once

#include "activations.h"
#include "capability.h"
#include "conv_shape.h"

namespace fastres::cpu {

template <typename T>
struct DirectConvKernel {
  int64_t panel;  // output channels
  // Any geometry: the product of gathered pixels and filters.
  void (*run)(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
              float* scratch);
};

// False where a sum was not finite: transforms spread Inf and NaN over a tile, so the direct kernel
// has to say what becomes of them.
template <typename T>
using WinogradJob = bool(const ConvShape& shape, const ConvOperands<T>& operands,
                         const ConvJob& job, float* scratch);

// No dilation.
template <typename T>
struct WinogradKernels {
  WinogradJob<T>*f2, *f4, *f4_plain;  // F(2x2, 3x3) and F(4x4, 3x3), stride 1
};

template <typename T>
struct PolyphaseKernels {
  WinogradJob<T>*of3, *of3_plain, *of7;  // F(4x4, 2x2) of 3x3 filters, F(3x3, 4x4) of 7x7, stride 2
};

template <typename T>
struct GroupedConvKernel {
  // Any geometry.
  void (*run)(const ConvShape& shape, const ConvOperands<T>& operands, const ConvJob& job,
              float* scratch);
};

// Writes the packed filters of some panels, see conv_pack.h.
using PackJob = void(const FilterView& filters, Range panels, float* out);

template <typename T>
struct PackKernels {
  PackJob *direct, *direct_bf16, *grouped, *grouped_bf16;
  PackJob *f2, *f4, *f4_plain, *polyphase3, *polyphase3_plain, *polyphase7;
};

FASTRES_DECLARE_KERNELS(PackKernels, pack_kernels)
FASTRES_DECLARE_KERNELS(DirectConvKernel, direct_conv_kernel)
FASTRES_DECLARE_KERNELS(GroupedConvKernel, grouped_conv_kernel)
FASTRES_DECLARE_KERNELS(WinogradKernels, winograd_kernels)
FASTRES_DECLARE_KERNELS(PolyphaseKernels, polyphase_kernels)

#if defined(FASTRES_X86)
// Products of bfloat16: kDirectBf16 and kGroupedBf16, for an even number of channels in a group.
namespace AVX512_BF16 {
template <typename T>
DirectConvKernel<T> direct_conv_kernel();
template <typename T>
GroupedConvKernel<T> grouped_conv_kernel();
}  // namespace AVX512_BF16
#endif

}  // namespace fastres::cpu
