// A kernel by name, for those who ask what became of it.
#pragma once

#include <string>
#include <vector>

namespace fastres::cuda {

struct KernelEntry {
  std::string name, form;
  const void* function;
  int threads;
  size_t dynamic_bytes;
};

// Each beside the code that launches them: of every kernel the forms that a ResNet uses most.
std::vector<KernelEntry> bn_relu_entries();
std::vector<KernelEntry> conv_entries();
std::vector<KernelEntry> conv_portable_entries();
std::vector<KernelEntry> conv_wgrad_entries();

}  // namespace fastres::cuda
