// add_relu and its gradient of csrc/cuda, emulated; called through ctypes.
#include "../../csrc/cuda/add_relu.cuh"

#include "calls.h"

// arrays: two operands and the result
extern "C" const char* add_relu(const char* dtype, void** arrays, int64_t n, bool backward) {
  return with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const auto combine = [&](auto f) {
      fastres::cuda::combine(emulator::Queue(), static_cast<const T*>(arrays[0]),
                             static_cast<const T*>(arrays[1]), static_cast<T*>(arrays[2]), n, f);
    };
    if (backward)
      combine(fastres::cuda::ReluMask{});
    else
      combine(fastres::cuda::AddRelu{});
  });
}
