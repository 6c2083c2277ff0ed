// Memory for packed filters and rows: aligned to cache lines, large pieces on huge pages where the
// system has them (filters are streamed, and every new page would stall the stream).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fastres::cpu {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Memory = std::unique_ptr<float, Free>;

// Uninitialised; throws std::bad_alloc.
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
