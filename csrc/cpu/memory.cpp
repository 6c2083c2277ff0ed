#include "memory.h"

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastres::cpu {

Memory allocate(int64_t values) {
  constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
  const size_t wanted = static_cast<size_t>(values) * sizeof(float);
  const size_t alignment = wanted >= kHugePage ? kHugePage : kLine;
  const size_t bytes = (wanted + alignment - 1) / alignment * alignment;
  Memory memory(static_cast<float*>(std::aligned_alloc(alignment, bytes)));
  if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
  if (alignment == kHugePage) madvise(memory.get(), bytes, MADV_HUGEPAGE);  // a wish: may fail
#endif
  return memory;
}

}  // namespace fastres::cpu
