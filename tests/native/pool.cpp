// The pool under eight threads: blocks that do not overlap, the bound, memory that is given back.
// Built with sanitizers and run by tests/native/Makefile; exits with 1 where something is wrong.
#include "../../csrc/cpu/pool.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/memory.h"

namespace {

using fastres::cpu::kHugePage;
using fastres::cpu::Pool;

constexpr size_t kLargest = size_t{3} << 20;

#define EXPECT(condition)                                                \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

struct Held {
  Pool::Block* block;
  size_t bytes;
  unsigned char mark;

  // Its mark at both ends and in the middle: whatever overlaps it leaves another.
  void fill() const {
    for (const size_t at : {size_t{0}, bytes / 2, bytes - 1}) block->address[at] = mark;
  }
  bool intact() const {
    for (const size_t at : {size_t{0}, bytes / 2, bytes - 1}) {
      if (static_cast<unsigned char>(block->address[at]) != mark) return false;
    }
    return true;
  }
};

void expect_bound(Pool& pool) {
  const auto usage = pool.usage();
  EXPECT(usage.in_use <= usage.peak);
  EXPECT(usage.in_use <= usage.held);
  EXPECT(usage.held <= std::max(2 * usage.peak, kHugePage));
}

// Takes and gives in a random order, never more than eight blocks at once.
void churn(Pool& pool, unsigned seed, int steps) {
  std::mt19937 random(seed);
  std::vector<Held> held;
  for (int step = 0; step < steps; ++step) {
    if (held.size() < 8 && random() % 2 == 0) {
      const size_t bytes = 1 + random() % (random() % 4 == 0 ? kLargest : 40000);
      auto* const block = pool.take(bytes);
      if (block == nullptr) continue;  // it would exceed the bound
      EXPECT(reinterpret_cast<uintptr_t>(block->address) % 4096 == 0);
      held.push_back({block, bytes, static_cast<unsigned char>(random())});
      held.back().fill();
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      EXPECT(held.back().intact());
      pool.give(held.back().block);
      held.pop_back();
    }
    if (step % 64 == 0) expect_bound(pool);
  }
  for (const auto& each : held) {
    EXPECT(each.intact());
    pool.give(each.block);
  }
}

void from_threads() {
  Pool pool;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 8; ++i) {
    threads.emplace_back([&pool, i] { churn(pool, i, 2000); });
  }
  for (auto& thread : threads) thread.join();
  EXPECT(pool.usage().in_use == 0);
  pool.release();
  EXPECT(pool.usage().held == 0);
}

// A small block serves requests of its size, also after others.
void keep_sizes() {
  Pool pool;
  auto *const first = pool.take(3 * 4096), *const second = pool.take(5 * 4096);
  char *const three = first->address, *const five = second->address;
  EXPECT(five == three + 3 * 4096);
  for (int i = 0; i < 2; ++i) {
    pool.give(i == 0 ? first : pool.take(3 * 4096));
    pool.give(i == 0 ? second : pool.take(5 * 4096));
    auto* const other = pool.take(8 * 4096);
    EXPECT(other->address == five + 5 * 4096);
    pool.give(other);
  }
  auto *const again = pool.take(5 * 4096), *const before = pool.take(3 * 4096);
  EXPECT(again->address == five && before->address == three);
  pool.give(again);
  pool.give(before);
  EXPECT(pool.usage().held == kHugePage);
  pool.release();
}

// Large ones join their neighbours at once, small ones before an arena can be given back.
void join() {
  Pool pool;
  auto* const large = pool.take(4 * kHugePage);
  char* const address = large->address;
  pool.give(large);
  auto *const left = pool.take(2 * kHugePage), *const right = pool.take(2 * kHugePage);
  EXPECT(left->address == address && right->address == address + 2 * kHugePage);
  pool.give(left);
  pool.give(right);
  auto* const whole = pool.take(4 * kHugePage);
  EXPECT(whole->address == address);
  pool.give(whole);
  std::vector<Pool::Block*> small;
  for (int i = 1; i < 9; ++i) small.push_back(pool.take(i * 4096));
  for (auto* const block : small) pool.give(block);
  EXPECT(pool.usage().held == 4 * kHugePage);
  pool.release();
  EXPECT(pool.usage().held == 0);
}

// After a peak is forgotten, its memory goes back without being asked for.
void forget() {
  Pool pool;
  pool.give(pool.take(16 * kHugePage));
  EXPECT(pool.usage().held == 16 * kHugePage);
  for (int i = 0; i < 2 * fastres::cpu::RecentPeak::kWindow; ++i) pool.give(pool.take(1000));
  EXPECT(pool.usage().held <= kHugePage);
  EXPECT(pool.usage().peak == 4096);
  pool.release();
}

// Where the bound is reached, nothing is given.
void refuse() {
  Pool pool;
  auto* const small = pool.take(1);
  auto* const rest = pool.take(kHugePage - 4096);
  EXPECT(small != nullptr && rest != nullptr);
  pool.give(rest);
  auto* const second = pool.take(kHugePage);  // peak: 2 MB and 4 KB, held: 4 MB
  EXPECT(second != nullptr);
  EXPECT(pool.take(size_t{1} << 60) == nullptr);
  EXPECT(pool.usage().peak < 2 * kHugePage);  // a request in vain leaves no trace
  pool.give(second);
  pool.give(small);
  pool.release();
  EXPECT(pool.usage().held == 0);
}

}  // namespace

int main() {
  keep_sizes();
  join();
  forget();
  refuse();
  from_threads();
  std::puts("pool: right");
}
