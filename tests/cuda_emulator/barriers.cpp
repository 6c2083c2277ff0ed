// Kernels by which the tests look at the emulator itself.
#include "emulator.h"

namespace {

constexpr int kThreads = 128;

void reverse(int* values, bool barrier) {
  __shared__ int staged[kThreads];
  staged[threadIdx.x] = values[threadIdx.x];
  if (barrier) __syncthreads();
  values[threadIdx.x] = staged[kThreads - 1 - threadIdx.x];
}

void wait_in_half() {
  if (threadIdx.x < kThreads / 2) __syncthreads();
}

}  // namespace

extern "C" bool reversal(bool barrier, int first) {
  int values[kThreads];
  for (int i = 0; i < kThreads; ++i) values[i] = first + i;
  emulator::Queue()(reverse, 1, kThreads, +values, barrier);
  for (int i = 0; i < kThreads; ++i) {
    if (values[i] != first + kThreads - 1 - i) return false;
  }
  return true;
}

extern "C" const char* half_of_a_block() {
  static std::string message;
  try {
    emulator::Queue()(wait_in_half, 1, kThreads);
    message = "done";
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
