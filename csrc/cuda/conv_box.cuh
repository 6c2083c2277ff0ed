// Boxes of 64 x 64 16-bit values in shared memory: rows of 128 bytes, swizzled as the tensor memory
// accelerator does, so that neither rows nor columns meet in one bank.
#pragma once

#include "pack.cuh"

namespace fastres::cuda {

constexpr int kBoxBytes = 64 * 128;

// Where a value lies, its column counted over boxes side by side.
__device__ inline char* place_in(char* box, int row, int column) {
  return box + column / 64 * kBoxBytes + row * 128 + (column % 64 * 2 ^ (row & 7) << 4);
}

}  // namespace fastres::cuda
