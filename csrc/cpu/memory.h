// Memory in large pieces, on huge pages where the system has them: what is streamed would stall at
// every new page.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fastres::cpu {

constexpr size_t kHugePage = size_t{2} << 20;

// Whole huge pages from the system, and aligned to them; null where it has none left.
void* map_pages(size_t bytes);
void unmap_pages(void* pages, size_t bytes);

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Memory = std::unique_ptr<float, Free>;

// Aligned to cache lines, large pieces to huge pages. Uninitialised; throws std::bad_alloc.
Memory allocate(int64_t values);

// Memory that grows with what is asked for and stays for the next; its contents do not.
class Scratch {
 public:
  float* of_size(int64_t values) {
    if (values > size_) {
      memory_.reset();
      size_ = 0;
      memory_ = allocate(values);
      size_ = values;
    }
    return memory_.get();
  }

 private:
  Memory memory_;
  int64_t size_ = 0;
};

}  // namespace fastres::cpu
