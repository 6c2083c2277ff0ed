// Kernels by which the tests look at the emulator itself.
#include "../../csrc/cuda/sm90.cuh"
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

// Two blocks of a cluster wait for each other's arrival; or the first one does not, and is gone
// when the second one arrives there.
void meet(bool arrive, bool together) {
  using namespace fastres::cuda;
  auto* barrier = reinterpret_cast<uint64_t*>(dynamic_shared());
  if (threadIdx.x == 0) barrier_init(barrier, 1);
  cluster_sync();
  const int rank = cluster_rank();
  if (rank == 1 && !together) emulator::wait_until([] { return emulator::blocks[0].running == 0; });
  if (threadIdx.x == 0 && (arrive || rank == 0)) barrier_arrive(barrier, 1 - rank);
  if (rank == 1 || together) barrier_wait(barrier, 0);
}

template <typename F>
const char* outcome_of(F run) {
  static std::string message;
  try {
    run();
    message = "done";
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
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
  return outcome_of([] { emulator::Queue()(wait_in_half, 1, kThreads); });
}

extern "C" const char* cluster(bool arrive, bool together) {
  return outcome_of([=] { emulator::Queue().launch(meet, {4, kThreads, 8, 2}, arrive, together); });
}
