// The functions of csrc/cuda/sm90.cuh and wgmma.cuh, as PTX ISA 8.0 describes the instructions.
//
// What is asynchronous happens late: copies at a random time, products when they are waited for. A
// stage that is released too early, a result that is read too early, shows as a wrong number.
#pragma once

#include <deque>

#include "emulator.h"

namespace fastres::cuda {

inline char* dynamic_shared() { return emulator::shared_memory(); }

inline uint32_t shared_address(const void* p) {
  const auto offset = static_cast<const char*>(p) - emulator::shared_memory();
  if (offset < 0 || offset >= int64_t(emulator::kSharedBytes)) {
    throw std::logic_error("not an address in shared memory");
  }
  return static_cast<uint32_t>(offset);
}

// --- mbarrier ---

struct BarrierState {
  int16_t arrivals, expected;
  int32_t bytes : 31;
  uint32_t parity : 1;

  void settle() {
    if (arrivals > 0 || bytes != 0) return;
    arrivals = expected;
    parity ^= 1;
  }
};
static_assert(sizeof(BarrierState) == sizeof(uint64_t));

inline BarrierState& state(uint64_t* barrier) { return *reinterpret_cast<BarrierState*>(barrier); }

inline void barrier_init(uint64_t* barrier, int arrivals) {
  state(barrier) = {int16_t(arrivals), int16_t(arrivals), 0, 0};
}

inline void barriers_ready() {}

inline void barrier_arrive(uint64_t* barrier) {
  if (--state(barrier).arrivals < 0) throw std::logic_error("more arrivals than a barrier expects");
  state(barrier).settle();
}

inline void barrier_expect(uint64_t* barrier, int bytes) {
  state(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

inline void barrier_complete(uint64_t* barrier, int bytes) {
  state(barrier).bytes -= bytes;
  state(barrier).settle();
}

inline void barrier_wait(uint64_t* barrier, int parity) {
  emulator::wait_until([=] { return int(state(barrier).parity) != parity; });
}

inline void group_sync(int number, int threads) {
  emulator::arrive_and_wait(emulator::this_block().barriers[number], threads);
}

// --- clusters ---

inline int cluster_rank() { return emulator::current / emulator::threads; }

inline int cluster_size() { return emulator::cluster; }

inline void cluster_sync() {
  arrive_and_wait(emulator::cluster_barrier, emulator::cluster * emulator::threads);
}

// What lies at the same place in another block of the cluster as `p` does in this one.
inline char* in_block(int rank, const void* p) {
  if (emulator::blocks[rank].running == 0) throw std::logic_error("that block has ended");
  return emulator::blocks[rank].shared_memory + shared_address(p);
}

inline void barrier_arrive(uint64_t* barrier, int rank) {
  barrier_arrive(reinterpret_cast<uint64_t*>(in_block(rank, barrier)));
}

inline void store_in_block(float4* to, int rank, const float4& value) {
  *reinterpret_cast<float4*>(in_block(rank, to)) = value;
}

// --- kernels behind each other ---

inline void wait_for_kernels_before() { emulator::fibers[emulator::current].waited = true; }

inline void let_next_kernel_begin() {}

// --- tensor memory accelerator ---

// Swizzling by 128 bytes: bits 4-6 of an address are xored with its bits 7-9.
inline char* swizzled(char* shared_memory, uint32_t address) {
  return shared_memory + (address ^ (address >> 7 & 7) << 4);
}

inline void check_map(const TensorMapFields& map, uint32_t to) {
  if (emulator::early && !emulator::fibers[emulator::current].waited) {
    throw std::logic_error("reads what the kernel before may not have written");
  }
  const bool aligned = reinterpret_cast<uintptr_t>(map.address) % 16 == 0;
  for (int d = 0; d + 1 < map.rank; ++d) {
    if (map.stride[d] % 16 != 0) throw std::logic_error("a stride that is no multiple of 16");
  }
  if (!aligned || to % 1024 != 0) throw std::logic_error("not aligned");
  if (map.box[0] != 64) throw std::logic_error("rows of a swizzled box must be 128 bytes");
}

// The value at these coordinates, or null outside of the array.
inline uint16_t* element(const TensorMapFields& map, const int64_t* at) {
  auto* p = static_cast<char*>(const_cast<void*>(map.address)) + 2 * at[0];
  for (int d = 0; d < map.rank; ++d) {
    if (at[d] < 0 || at[d] >= int64_t(map.size[d])) return nullptr;
    if (d > 0) p += map.stride[d - 1] * at[d];
  }
  return reinterpret_cast<uint16_t*>(p);
}

// One row of 64 values, those of neighbouring innermost coordinates.
inline void load_row(const TensorMapFields& map, const int64_t* first, char* shared_memory,
                     uint32_t to) {
  for (int i = 0; i < 64; ++i) {
    const int64_t at[4] = {first[0] + i, first[1], first[2], first[3]};
    const uint16_t* from = element(map, at);
    *reinterpret_cast<uint16_t*>(swizzled(shared_memory, to + 2 * i)) = from ? *from : 0;
  }
}

inline void load_im2col(void* to, const TensorMap* p, uint64_t* barrier, int c, const Window& at,
                        int tap_w, int tap_h) {
  const TensorMapFields map = *p;
  char* const shared = emulator::shared_memory();
  const uint32_t address = shared_address(to);
  check_map(map, address);
  emulator::pending.push_back([=] {
    int64_t w = at.w, h = at.h, n = at.n;
    for (uint32_t i = 0; i < map.pixels; ++i) {
      const int64_t first[4] = {c, w + tap_w, h + tap_h, n};
      load_row(map, first, shared, address + 128 * i);
      w += map.step[1];
      if (w < int64_t(map.size[1]) + map.upper[0]) continue;
      w = map.lower[0];
      h += map.step[2];
      if (h < int64_t(map.size[2]) + map.upper[1]) continue;
      h = map.lower[1];
      ++n;
    }
    barrier_complete(barrier, 128 * map.pixels);
  });
}

// Into one block of the cluster.
inline void load_3d_into(int rank, void* to, const TensorMap* p, uint64_t* barrier, int x, int y,
                         int z) {
  const TensorMapFields map = *p;
  const uint32_t address = shared_address(to);
  auto* const there = reinterpret_cast<uint64_t*>(in_block(rank, barrier));
  check_map(map, address);
  emulator::pending.push_back([=] {
    emulator::Block& block = emulator::blocks[rank];
    if (block.running == 0) throw std::logic_error("a copy into a block that has ended");
    uint32_t row = 0;
    for (uint32_t k = 0; k < map.box[2]; ++k) {
      for (uint32_t j = 0; j < map.box[1]; ++j) {
        const int64_t first[4] = {x, y + int64_t(j), z + int64_t(k), 0};
        load_row(map, first, block.shared_memory, address + 128 * row++);
      }
    }
    barrier_complete(there, 128 * row);
  });
}

inline void load_3d(void* to, const TensorMap* p, uint64_t* barrier, int x, int y, int z) {
  load_3d_into(cluster_rank(), to, p, barrier, x, y, z);
}

inline void load_3d_everywhere(void* to, const TensorMap* p, uint64_t* barrier, int x, int y,
                               int z) {
  for (int rank = 0; rank < emulator::cluster; ++rank) {
    load_3d_into(rank, to, p, barrier, x, y, z);
  }
}

inline void prefetch_3d(const TensorMap*, int, int, int) {}

inline void load_2d(void* to, const TensorMap* p, uint64_t* barrier, int x, int y) {
  const TensorMapFields map = *p;
  char* const shared = emulator::shared_memory();
  const uint32_t address = shared_address(to);
  check_map(map, address);
  emulator::pending.push_back([=] {
    for (uint32_t j = 0; j < map.box[1]; ++j) {
      const int64_t first[4] = {x, y + int64_t(j), 0, 0};
      load_row(map, first, shared, address + 128 * j);
    }
    barrier_complete(barrier, 128 * map.box[1]);
  });
}

inline int stores_under_way;

inline void store_2d(const TensorMap* p, const void* from, int x, int y) {
  const TensorMapFields map = *p;
  char* const shared = emulator::shared_memory();
  const uint32_t address = shared_address(from);
  check_map(map, address);
  ++stores_under_way;
  emulator::pending.push_back([=] {
    for (uint32_t j = 0; j < map.box[1]; ++j) {
      for (int i = 0; i < 64; ++i) {
        const int64_t at[4] = {x + i, y + int64_t(j), 0, 0};
        uint16_t* to = element(map, at);
        if (to) *to = *reinterpret_cast<uint16_t*>(swizzled(shared, address + 128 * j + 2 * i));
      }
    }
    --stores_under_way;
  });
}

inline void stores_commit() {}

// All threads' stores rather than this one's: longer than needed, which is no error of the
// kernel's.
inline void stores_wait_read() {
  emulator::wait_until([] { return stores_under_way == 0; });
}

inline void stores_wait() { stores_wait_read(); }

inline void fence_shared() {}

template <int N>
void give_registers() {}

template <int N>
void take_registers() {}

// --- wgmma ---

using Group = std::vector<std::function<void()>>;
inline std::vector<std::deque<Group>> groups;  // of each thread; the last one is open

inline std::deque<Group>& groups_of_this_thread() {
  if (groups.size() < emulator::fibers.size()) groups.resize(emulator::fibers.size());
  auto& mine = groups[emulator::current];
  if (mine.empty()) mine.emplace_back();
  return mine;
}

inline void mma_fence() {}

inline void mma_commit() { groups_of_this_thread().emplace_back(); }

template <int N>
void mma_wait() {
  auto& mine = groups_of_this_thread();
  while (mine.size() > N + 1) {
    for (const auto& product : mine.front()) product();
    mine.pop_front();
  }
  emulator::arrive_and_wait(emulator::warps[emulator::current / 32].barrier, 32);  // .sync.aligned
}

template <int N>
void hold(float (&)[N]) {}

// Row `row` of an operand: 16 values from where its descriptor points to. Transposed, it is a
// column of boxes of 64 columns; the next box and the next eight rows are where the descriptor
// says.
template <typename T, bool kTransposed>
void read_operand(uint64_t descriptor, int row, float* values) {
  const auto field = [&](int bit) { return uint32_t(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), next_box = field(16), eight_rows = field(32);
  if (descriptor >> 62 != 1) throw std::logic_error("not swizzled by 128 bytes");
  for (int i = 0; i < 16; ++i) {
    const uint32_t at = kTransposed
                            ? row / 64 * next_box + i / 8 * eight_rows + i % 8 * 128 + row % 64 * 2
                            : row / 8 * eight_rows + row % 8 * 128 + 2 * i;
    values[i] = widen(*reinterpret_cast<T*>(swizzled(emulator::shared_memory(), start + at)));
  }
}

template <typename T, bool kTransposed, int HALF>
void mma(float (&d)[HALF], uint64_t a, uint64_t b, int add) {
  const int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4;
  float* sums = d;
  groups_of_this_thread().back().push_back([=] {
    float rows[2][16], column[16];
    read_operand<T, kTransposed>(a, row, rows[0]);
    read_operand<T, kTransposed>(a, row + 8, rows[1]);
    for (int j = 0; j < HALF / 4; ++j) {
      for (int e = 0; e < 2; ++e) {
        read_operand<T, kTransposed>(b, 8 * j + thread % 4 * 2 + e, column);
        for (int h = 0; h < 2; ++h) {
          float& sum = sums[4 * j + 2 * h + e];
          float product = 0;
          for (int k = 0; k < 16; ++k) product += rows[h][k] * column[k];
          sum = add ? sum + product : product;
        }
      }
    }
  });
}

}  // namespace fastres::cuda
