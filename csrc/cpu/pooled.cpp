#include "pooled.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <utility>

#ifdef __unix__
#include <pthread.h>
#endif

namespace fastres::cpu {
namespace {

void give_back(void* context) {
  auto* const block = static_cast<Pool::Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(block->address);
  block->pool->give(block);
}

// torch's own allocator for what is smaller than `least`, or more than the pool may hold.
class PooledAllocator final : public c10::Allocator {
 public:
  explicit PooledAllocator(size_t least) : least_(least) {}

  c10::DataPtr allocate(size_t bytes) override {
    auto* const block = bytes < least_ ? nullptr : pool.take(bytes);
    if (block == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(block->address, bytes);
    return {block->address, block, &give_back, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  Pool pool;

 private:
  size_t least_;
};

struct Allocators {
  PooledAllocator outputs{64 * 1024}, filters{4 * 1024};

  Allocators() {
#ifdef __unix__
    pthread_atfork([] { lock(); }, [] { unlock(); }, [] { unlock(); });
#endif
  }

  static void lock();
  static void unlock();
};

// Never destroyed, for tensors may outlive every static object.
Allocators& allocators() {
  static auto* const instance = new Allocators;
  return *instance;
}

void Allocators::lock() {
  allocators().outputs.pool.lock();
  allocators().filters.pool.lock();
}

void Allocators::unlock() {
  allocators().filters.pool.unlock();
  allocators().outputs.pool.unlock();
}

at::Tensor empty(at::IntArrayRef size, PooledAllocator& allocator, at::ScalarType dtype,
                 std::optional<at::MemoryFormat> format) {
  constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);
  return at::Tensor(at::detail::empty_generic(size, &allocator, kCpu, dtype, format));
}

}  // namespace

at::Tensor empty_output(at::IntArrayRef size, at::ScalarType dtype, at::MemoryFormat format) {
  return empty(size, allocators().outputs, dtype, format);
}

bool owns_output(const at::Tensor& t) {
  return t.storage().use_count() == 1 && t.storage().data_ptr().get_deleter() == &give_back;
}

at::Tensor empty_filters(int64_t values) {
  return empty({values}, allocators().filters, at::kFloat, std::nullopt);
}

PoolInfo pool_info() {
  return {allocators().outputs.pool.usage(), allocators().filters.pool.usage()};
}

void release_pools() {
  allocators().outputs.pool.release();
  allocators().filters.pool.release();
}

}  // namespace fastres::cpu
