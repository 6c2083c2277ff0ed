// How many threads run a kernel, and what they are given.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastres::cuda {

struct Grid {
  int64_t blocks;
  int threads;  // of a block
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks of one
  // Begins while the kernel before still runs; see wait_for_kernels_before().
  bool early = false;
};

}  // namespace fastres::cuda
