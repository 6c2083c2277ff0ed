// The functions of csrc/cuda/sm80.cuh, as PTX ISA 7.0 describes the instructions.
//
// Copies happen at once or when they are waited for, at random: a stage that is overwritten or read
// too early shows as a wrong number.
#pragma once

#include <deque>

#include "emulator.h"

namespace fastres::cuda {

inline char* dynamic_shared_memory() { return emulator::shared_memory(); }

// --- cp.async ---

using Copies = std::vector<std::function<void()>>;
inline std::vector<std::deque<Copies>> copy_groups;  // of each thread; the last one is open

inline std::deque<Copies>& copies_of_this_thread() {
  if (copy_groups.size() < emulator::fibers.size()) copy_groups.resize(emulator::fibers.size());
  auto& mine = copy_groups[emulator::current];
  if (mine.empty()) mine.emplace_back();
  return mine;
}

inline void copy_later(void* to, const void* from, bool exists) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    throw std::logic_error("not aligned");
  }
  const auto copy = [=] {
    if (exists)
      std::memcpy(to, from, 16);
    else
      std::memset(to, 0, 16);
  };
  if (emulator::random_numbers() % 2) return copy();
  copies_of_this_thread().back().push_back(copy);
}

inline void copies_commit() { copies_of_this_thread().emplace_back(); }

template <int N>
void copies_wait() {
  auto& mine = copies_of_this_thread();
  while (mine.size() > N + 1) {
    for (const auto& copy : mine.front()) copy();
    mine.pop_front();
  }
}

// --- ldmatrix ---

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulator::Warp& warp = emulator::warps[emulator::current / 32];
  const int lane = emulator::current % 32;
  const auto offset = static_cast<const char*>(row) - emulator::shared_memory();
  if (offset < 0 || offset >= int64_t(emulator::kSharedBytes) || offset % 16 != 0) {
    throw std::logic_error("not a row in shared memory");
  }
  warp.slots[lane] = double(offset);
  emulator::arrive_and_wait(warp.barrier, 32);
  for (int i = 0; i < 4; ++i) {
    const auto* values = emulator::shared_memory() + int64_t(warp.slots[8 * i + lane / 4]);
    std::memcpy(&to[i], values + lane % 4 * 4, sizeof(to[i]));
  }
  emulator::arrive_and_wait(warp.barrier, 32);
}

// --- mma.sync ---

struct Fragments {
  uint32_t a[32][4], b[32][2];  // of each lane
};
inline std::vector<Fragments> fragments;  // of each warp

template <typename T>
float value_of(uint32_t pair, int i) {
  const uint16_t bits = uint16_t(pair >> 16 * i);
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
  return widen(value);
}

template <typename T>
void multiply_add(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const size_t index = emulator::current / 32;
  if (fragments.size() <= index) fragments.resize(emulator::warps.size());
  const int lane = emulator::current % 32;
  Fragments& warp = fragments[index];
  std::copy(a, a + 4, warp.a[lane]);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  emulator::arrive_and_wait(emulator::warps[index].barrier, 32);
  for (int h = 0; h < 2; ++h) {
    for (int e = 0; e < 2; ++e) {
      const int row = lane / 4, column = lane % 4 * 2 + e;
      float product = 0;
      for (int k = 0; k < 16; ++k) {
        const int from = k % 8 / 2;
        product += value_of<T>(warp.a[row * 4 + from][h + k / 8 * 2], k % 2) *
                   value_of<T>(warp.b[column * 4 + from][k / 8], k % 2);
      }
      d[2 * h + e] += product;
    }
  }
  emulator::arrive_and_wait(emulator::warps[index].barrier, 32);
}

}  // namespace fastres::cuda
