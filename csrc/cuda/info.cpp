#include "info.h"

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "kernel_entry.h"
#include "launch.h"

namespace fastres::cuda {
namespace {

std::vector<KernelEntry> entries() {
  std::vector<KernelEntry> all;
  for (const auto& of :
       {bn_relu_entries(), conv_entries(), conv_portable_entries(), conv_wgrad_entries()}) {
    all.insert(all.end(), of.begin(), of.end());
  }
  return all;
}

}  // namespace

Info info() {
  Info found{};
  cudaDriverGetVersion(&found.driver);
  cudaRuntimeGetVersion(&found.runtime);
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
    found.error = cudaGetErrorString(error);
    cudaGetLastError();  // it is no launch's
    return found;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, i) != cudaSuccess) continue;
    found.devices.push_back({p.name, p.major, p.minor, p.multiProcessorCount});
  }
  return found;
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const KernelEntry& e : entries()) {
    if (std::find(names.begin(), names.end(), e.name) == names.end()) names.push_back(e.name);
  }
  return names;
}

std::vector<KernelInfo> kernels() {
  std::vector<KernelInfo> found;
  for (const KernelEntry& e : entries()) {
    cudaFuncAttributes a;
    check_cuda(cudaFuncGetAttributes(&a, e.function), e.name.c_str());
    if (cudaFuncSetAttribute(e.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(e.dynamic_bytes)) != cudaSuccess) {
      cudaGetLastError();  // made for a device with more shared memory
      continue;
    }
    int blocks = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, e.function, e.threads,
                                                             e.dynamic_bytes),
               e.name.c_str());
    found.push_back({e.name, e.form, a.numRegs, static_cast<int>(a.localSizeBytes),
                     static_cast<int>(a.sharedSizeBytes + e.dynamic_bytes), blocks,
                     a.binaryVersion});
  }
  return found;
}

}  // namespace fastres::cuda
