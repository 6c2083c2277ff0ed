#include "memory.h"

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastres::cpu {
namespace {

void wish_for_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  madvise(p, bytes, MADV_HUGEPAGE);  // may fail
#endif
}

}  // namespace

#ifdef __linux__

// Not from the C library, which might keep for itself what it is given back.
void* map_pages(size_t bytes) {
  const size_t mapped = bytes + kHugePage;
  void* const whole = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                           /*fd=*/-1, /*offset=*/0);
  if (whole == MAP_FAILED) return nullptr;
  const size_t before = -reinterpret_cast<uintptr_t>(whole) % kHugePage;
  char* const pages = static_cast<char*>(whole) + before;
  if (before > 0) munmap(whole, before);
  munmap(pages + bytes, kHugePage - before);
  wish_for_huge_pages(pages, bytes);
  return pages;
}

void unmap_pages(void* pages, size_t bytes) { munmap(pages, bytes); }

#else

void* map_pages(size_t bytes) { return std::aligned_alloc(kHugePage, bytes); }

void unmap_pages(void* pages, size_t) { std::free(pages); }

#endif

Memory allocate(int64_t values) {
  constexpr size_t kLine = 64;
  const size_t wanted = static_cast<size_t>(values) * sizeof(float);
  const size_t alignment = wanted >= kHugePage ? kHugePage : kLine;
  const size_t bytes = (wanted + alignment - 1) / alignment * alignment;
  Memory memory(static_cast<float*>(std::aligned_alloc(alignment, bytes)));
  if (memory == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) wish_for_huge_pages(memory.get(), bytes);
  return memory;
}

}  // namespace fastres::cpu
