// How the host code beside the kernels launches them; free of torch, so that nvcc compiles it fast.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "grid.h"

namespace fastres::cuda {

// Something that runs kernels in the order of the calls: a stream here, the tests' emulator there.
class Queue {
 public:
  Queue(const char* name, cudaStream_t stream) : name_(name), stream_(stream) {}

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads,
                  const Arguments&... arguments) const {
    launch(kernel, {blocks, threads}, arguments...);
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), const Grid& grid,
              const Arguments&... arguments) const {
    if (grid.blocks > std::numeric_limits<int32_t>::max()) {
      throw std::runtime_error(std::string(name_) + ": a launch of " + std::to_string(grid.blocks) +
                               " blocks is too large");
    }
    if (grid.shared_bytes > 0) {  // more than the 48 KB that every kernel may have
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(grid.shared_bytes)));
    }
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(grid.blocks), config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared_bytes, config.stream = stream_;
    config.attrs = attributes;
    if (grid.cluster > 1) {
      auto& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    }
    if (grid.early) {
      auto& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

 private:
  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(name_) + ": launch failed: " + cudaGetErrorString(error));
  }

  const char* name_;
  cudaStream_t stream_;
};

}  // namespace fastres::cuda
