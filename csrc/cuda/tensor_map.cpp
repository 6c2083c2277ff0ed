#include "tensor_map.h"

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

namespace fastres::cuda {
namespace {

// Of the driver, found at run time: nothing links libcuda, which a machine without a GPU lacks.
template <typename Function>
Function find(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status{};
  const auto error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status);
  TORCH_CHECK(error == cudaSuccess && status == cudaDriverEntryPointSuccess && found != nullptr,
              "the GPU's driver has no ", name, ": it is older than CUDA 12, or missing");
  return reinterpret_cast<Function>(found);
}

constexpr auto kNoInterleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
constexpr auto kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
constexpr auto kOutside = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;  // zeros

}  // namespace

TensorMap encode(const TensorMapFields& f) {
  static const auto tiled = find<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static const auto im2col = find<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  TensorMap map;
  void* address = const_cast<void*>(f.address);
  const auto type = f.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      f.im2col ? im2col(&map, type, f.rank, address, f.size, f.stride, f.lower, f.upper, f.box[0],
                        f.pixels, f.step, kNoInterleave, kSwizzle, kPromotion, kOutside)
               : tiled(&map, type, f.rank, address, f.size, f.stride, f.box, f.step, kNoInterleave,
                       kSwizzle, kPromotion, kOutside);
  TORCH_CHECK(result == CUDA_SUCCESS, "the GPU's driver refused a tensor map: CUresult ", result);
  return map;
}

}  // namespace fastres::cuda
