// Runs CUDA kernels, compiled as plain C++, on the CPU: for tests on machines without a GPU.
//
// The threads of a block are fibers of one CPU thread. They are resumed in a random order and run
// until they have to wait, so a missing barrier shows as a wrong result, a barrier that not every
// thread reaches as a deadlock, which is reported. Blocks run one after the other, in random order;
// those of a cluster together.
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/grid.h"

#undef __shared__
#define __shared__ static  // one block at a time
#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

using Condition = std::function<bool()>;

// Entered once as a context, then by jumps, which need no system call.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  jmp_buf place;
  Condition waits_for;  // empty: it can go on
  bool started, done;
  bool waited;  // for the kernel before
};

struct Barrier {
  int arrived = 0;
  int64_t round = 0;
};

constexpr size_t kSharedBytes = 227 << 10;
constexpr int kMostOfACluster = 8;

struct Block {
  Barrier barriers[16];
  int running;  // threads
  alignas(1024) char shared_memory[kSharedBytes];
};

struct Warp {
  Barrier barrier;
  double slots[32];
};

constexpr size_t kStackBytes = 64 << 10;

inline std::mt19937 random_numbers{1};
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline int current, threads;  // the fiber that runs; threads of a block
inline unsigned first_block;
inline Block blocks[kMostOfACluster];
inline int cluster;  // blocks of one
inline bool early;   // the kernel before may still run
inline Barrier cluster_barrier;
inline std::vector<Warp> warps;
inline std::function<void()> body;
inline std::exception_ptr failure;  // of a fiber
// What other units of a multiprocessor have been asked to do: done at any time.
inline std::vector<std::function<void()>> pending;

inline Block& this_block() { return blocks[current / threads]; }
inline char* shared_memory() { return this_block().shared_memory; }

inline void wait_until(Condition condition) {
  if (condition()) return;
  Fiber& self = fibers[current];
  self.waits_for = std::move(condition);
  if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}

inline void arrive_and_wait(Barrier& barrier, int expected) {
  const int64_t round = barrier.round;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  wait_until([&barrier, round] { return barrier.round != round; });
}

inline void enter() {
  try {
    body();
  } catch (...) {
    failure = std::current_exception();  // thrown on by the scheduler: this stack has no caller
  }
  fibers[current].done = true;
  --this_block().running;
  _longjmp(scheduler, 1);
}

inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  fiber.waits_for = nullptr;
  current = thread;
  threadIdx = {static_cast<unsigned>(thread % threads), 0, 0};
  blockIdx = {first_block + thread / threads, 0, 0};
  if (_setjmp(scheduler) != 0) return;  // it waits, or is done
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &enter, 0);
  fiber.waits_for = nullptr;
  fiber.started = fiber.done = fiber.waited = false;
}

inline bool do_something_pending() {
  if (pending.empty()) return false;
  const size_t i = random_numbers() % pending.size();
  const auto action = std::move(pending[i]);
  pending.erase(pending.begin() + i);
  action();
  return true;
}

inline void run_cluster() {
  const int all = cluster * threads;
  if (fibers.size() < static_cast<size_t>(all)) fibers.resize(all);
  warps.assign((all + 31) / 32, Warp());
  for (int i = 0; i < cluster; ++i) {
    Block& block = blocks[i];
    for (Barrier& barrier : block.barriers) barrier = Barrier();
    block.running = threads;
    std::memset(block.shared_memory, 0xff, kSharedBytes);  // NaN in every type
  }
  cluster_barrier = Barrier();
  std::vector<int> order(all);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < all; ++i) prepare(fibers[i]);
  for (int left = all; left > 0;) {
    bool moved = false;
    std::shuffle(order.begin(), order.begin() + left, random_numbers);
    for (int i = 0; i < left; ++i) {
      Fiber& fiber = fibers[order[i]];
      if (fiber.waits_for && !fiber.waits_for()) continue;
      resume(order[i]);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
      moved = true;
      if (fiber.done) std::swap(order[i--], order[--left]);
      if (random_numbers() % 8 == 0) do_something_pending();
    }
    if (!moved && !do_something_pending()) throw std::runtime_error("deadlock");
  }
  while (do_something_pending()) {
  }
}

// Launches kernels as fastres::cuda::Queue does, and waits for them.
struct Queue {
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int block_threads,
                  const Arguments&... arguments) const {
    launch(kernel, {blocks, block_threads}, arguments...);
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), const fastres::cuda::Grid& grid,
              const Arguments&... arguments) const {
    if (grid.shared_bytes > kSharedBytes) throw std::logic_error("too much shared memory");
    if (grid.blocks % grid.cluster != 0) throw std::logic_error("a cluster that is not whole");
    pending.clear();  // what a launch that failed left
    threads = grid.threads;
    cluster = grid.cluster;
    early = grid.early;
    blockDim = dim3(threads);
    gridDim = dim3(static_cast<unsigned>(grid.blocks));
    body = [&] { kernel(arguments...); };
    std::vector<unsigned> order(grid.blocks / cluster);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (unsigned i : order) {
      first_block = i * cluster;
      run_cluster();
    }
  }
};

}  // namespace emulator

inline void __syncthreads() {
  emulator::arrive_and_wait(emulator::this_block().barriers[0], emulator::threads);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != 0xffffffffu) throw std::logic_error("shuffle of a part of a warp");
  emulator::Warp& warp = emulator::warps[emulator::current / 32];
  const int lane = emulator::current % 32;
  warp.slots[lane] = value;
  emulator::arrive_and_wait(warp.barrier, 32);
  const T other = static_cast<T>(warp.slots[lane ^ lanes]);
  emulator::arrive_and_wait(warp.barrier, 32);
  return other;
}
