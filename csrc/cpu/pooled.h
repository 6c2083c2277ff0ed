// Tensors in memory that is kept for the next call: see pool.h.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

#include "pool.h"

namespace fastres::cpu {

// An operator's output, uninitialised and dense in `format`. Its storage is like any other: it
// outlives the call, and may be resized, shared and pickled. Small ones are torch's own.
at::Tensor empty_output(at::IntArrayRef size, at::ScalarType dtype, at::MemoryFormat format);

inline at::Tensor empty_output(const at::Tensor& like, at::MemoryFormat format) {
  return empty_output(like.sizes(), like.scalar_type(), format);
}

// Whether a tensor has such an output's memory, and no other tensor has it too.
bool owns_output(const at::Tensor& t);

// Packed filters. They have a pool to themselves, for they stay.
at::Tensor empty_filters(int64_t values);

struct PoolInfo {
  Pool::Usage outputs, filters;
};

PoolInfo pool_info();
void release_pools();

}  // namespace fastres::cpu
