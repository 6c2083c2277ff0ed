// How the host code beside the kernels launches them; free of torch, so that nvcc compiles it fast.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace fastres::cuda {

// Something that runs kernels in the order of the calls: a stream here, the tests' emulator there.
class Queue {
 public:
  Queue(const char* name, cudaStream_t stream) : name_(name), stream_(stream) {}

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads,
                  const Arguments&... arguments) const {
    launch(kernel, blocks, threads, 0, 1, arguments...);
  }

  // With dynamic shared memory, more than the 48 KB that every kernel may have, and in clusters of
  // so many blocks.
  template <typename... Parameters, typename... Arguments>
  void with_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t bytes,
                   int cluster, const Arguments&... arguments) const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(bytes)));
    launch(kernel, blocks, threads, bytes, cluster, arguments...);
  }

 private:
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t bytes, int cluster,
              const Arguments&... arguments) const {
    if (blocks > std::numeric_limits<int32_t>::max()) {
      throw std::runtime_error(std::string(name_) + ": a launch of " + std::to_string(blocks) +
                               " blocks is too large");
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(blocks), config.blockDim = threads;
    config.dynamicSmemBytes = bytes, config.stream = stream_;
    config.attrs = &attribute, config.numAttrs = cluster > 1;
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(name_) + ": launch failed: " + cudaGetErrorString(error));
  }

  const char* name_;
  cudaStream_t stream_;
};

}  // namespace fastres::cuda
