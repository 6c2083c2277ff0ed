// What the CUDA part finds on this machine: for `fastres info` and for tests.
#pragma once

#include <string>
#include <vector>

namespace fastres::cuda {

struct DeviceInfo {
  std::string name;
  int major, minor, multiprocessors;
};

// CUDA's versions as 1000 * major + 10 * minor; a driver of 0: there is none. No context is made.
struct Info {
  int driver, runtime;
  std::string error;  // why there are no devices
  std::vector<DeviceInfo> devices;
};

Info info();

// The kernels' names, without a device.
std::vector<std::string> kernel_names();

// As compiled for the current device, whose driver loads it.
struct KernelInfo {
  std::string name, form;
  int registers, local_bytes, shared_bytes, blocks_per_multiprocessor, architecture;
};

// Those that this device can run.
std::vector<KernelInfo> kernels();

}  // namespace fastres::cuda
