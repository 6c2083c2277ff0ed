// Runs CUDA kernels, compiled as plain C++, on the CPU: for tests on machines without a GPU.
//
// The threads of a block are fibers of one CPU thread. They are resumed in a random order and run
// until they have to wait, so a missing barrier shows as a wrong result, a barrier that not every
// thread reaches as a deadlock, which is reported. Blocks run one after the other, in random order.
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

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
};

struct Barrier {
  int arrived = 0;
  int64_t round = 0;
};

struct Warp {
  Barrier barrier;
  double slots[32];
};

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedBytes = 227 << 10;

inline std::mt19937 random_numbers{1};
inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline int current, threads;
inline Barrier barriers[16];
inline std::vector<Warp> warps;
inline std::function<void()> body;
alignas(1024) inline char shared_memory[kSharedBytes];
// What other units of a multiprocessor have been asked to do: done at any time.
inline std::vector<std::function<void()>> pending;

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
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  fiber.waits_for = nullptr;
  current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
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
  fiber.started = fiber.done = false;
}

inline bool do_something_pending() {
  if (pending.empty()) return false;
  const size_t i = random_numbers() % pending.size();
  const auto action = std::move(pending[i]);
  pending.erase(pending.begin() + i);
  action();
  return true;
}

inline void run_block() {
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  warps.assign((threads + 31) / 32, Warp());
  for (Barrier& barrier : barriers) barrier = Barrier();
  std::memset(shared_memory, 0xff, sizeof(shared_memory));  // NaN in every type
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < threads; ++i) prepare(fibers[i]);
  for (int left = threads; left > 0;) {
    bool moved = false;
    std::shuffle(order.begin(), order.begin() + left, random_numbers);
    for (int i = 0; i < left; ++i) {
      Fiber& fiber = fibers[order[i]];
      if (fiber.waits_for && !fiber.waits_for()) continue;
      resume(order[i]);
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
    threads = block_threads;
    blockDim = dim3(threads);
    gridDim = dim3(static_cast<unsigned>(blocks));
    body = [&] { kernel(arguments...); };
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (unsigned block : order) {
      blockIdx = {block, 0, 0};
      run_block();
    }
  }

  template <typename... Parameters, typename... Arguments>
  void with_shared(void (*kernel)(Parameters...), int64_t blocks, int block_threads, size_t bytes,
                   const Arguments&... arguments) const {
    if (bytes > kSharedBytes) throw std::logic_error("too much shared memory");
    (*this)(kernel, blocks, block_threads, arguments...);
  }
};

}  // namespace emulator

inline void __syncthreads() { emulator::arrive_and_wait(emulator::barriers[0], emulator::threads); }

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
