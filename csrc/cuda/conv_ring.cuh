// What the convolutions for sm_90a share: a ring of stages in shared memory, filled by one thread
// through the tensor memory accelerator and emptied by two warpgroups that multiply.
#pragma once

#include "conv_prologue.cuh"
#include "sm90.cuh"

namespace fastres::cuda {

constexpr int kConvThreads = 384;

// A position in the ring: the stage, and the parity of its present use.
struct Stage {
  int index = 0, parity = 0;

  template <int kStages>
  __device__ void advance() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

// A stage is full when its bytes are there, empty when the eight warps of each block that gets a
// part of it are done with it: in a cluster, with the same stage of every block.
template <int kStages, int kCluster = 1>
__device__ void init_ring(uint64_t* full, uint64_t* empty) {
  for (int i = 0; i < kStages; ++i) {
    barrier_init(&full[i], 1);
    barrier_init(&empty[i], 8 * kCluster);
  }
}

// One of those warps is done.
template <int kCluster>
__device__ void release(uint64_t* empty) {
  if constexpr (kCluster == 1)
    barrier_arrive(empty);
  else
    for (int rank = 0; rank < kCluster; ++rank) barrier_arrive(empty, rank);
}

// Describes an operand of a product: boxes of 64 values a row. Where the sum runs over the rows,
// the operand is transposed, and its columns may go on in the next box.
template <bool kTransposed>
__device__ inline uint64_t operand(const char* box) {
  constexpr uint64_t kNextBox = kTransposed ? kBoxBytes >> 4 : 1;
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (shared_address(box) & 0x3ffff) >> 4 | kNextBox << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}

// Of the pixels of a warpgroup's box a thread prepares this one and every 16th behind it.
__device__ inline int box_row() { return threadIdx.x % 128 / 8; }

// The prologue of a warpgroup's box of 64 pixels x 64 channels, of which so many exist, in place
// before it is multiplied; a thread has the same pack of its four pixels. has(i): whether the i-th
// lies in the input; norm(c): four of the box's channels.
template <typename T, typename Has, typename Norm>
__device__ void prepare_box(char* box, int channels, Has has, Norm norm, int group) {
  if (const int column = threadIdx.x % 8 * 8; column < channels) {
    normalise<T, 4>(
        has, [&](int half) { return norm(column + 4 * half); },
        [&](int i) { return place_in(box, box_row() + 16 * i, column); });
  }
  fence_shared();
  group_sync(1 + group, 128);
}

// sum = the products of `steps` stages, 64 of the inner dimension each, one warpgroup's rows.
// a(stage) and b(stage) describe the operands, once prepare(stage) was called. A product's 16 of
// the inner dimension are 32 bytes of a row or, transposed, 16 rows of 128 bytes.
template <typename T, bool kTransposed, int kStages, int kCluster = 1, int HALF, typename Prepare,
          typename A, typename B>
__device__ void multiply(uint64_t* full, uint64_t* empty, float (&sum)[HALF], Stage& stage,
                         int steps, int lane, Prepare prepare, A a, B b) {
  constexpr int kAdvance = (kTransposed ? 16 * 128 : 32) >> 4;
  int previous = -1;
  for (int step = 0; step < steps; ++step) {
    barrier_wait(&full[stage.index], stage.parity);
    prepare(stage.index);
    const uint64_t left = a(stage.index), right = b(stage.index);
    hold(sum);
    mma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mma<T, kTransposed>(sum, left + kAdvance * i, right + kAdvance * i, step | i);
    }
    mma_commit();
    mma_wait<1>();
    if (previous >= 0 && lane == 0) release<kCluster>(&empty[previous]);
    previous = stage.index;
    stage.advance<kStages>();
  }
  mma_wait<0>();
  hold(sum);
  if (lane == 0) release<kCluster>(&empty[previous]);
}

}  // namespace fastres::cuda
