// Memory that is kept when it is freed, for whoever asks next. By default the system gets large
// pieces back and fills the new ones with zeros, page by page: a tenth of a network's time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

namespace fastres::cpu {

// The most that was in use at once, of late: in this window of requests and the one before.
class RecentPeak {
 public:
  static constexpr int64_t kWindow = 4096;  // some 80 calls of a ResNet-50

  void note(size_t in_use) {
    if (++requests_ == kWindow) {
      before_ = std::exchange(now_, 0);
      requests_ = 0;
    }
    now_ = std::max(now_, in_use);
  }

  size_t bytes() const { return std::max(now_, before_); }

 private:
  size_t now_ = 0, before_ = 0;
  int64_t requests_ = 0;
};

// Blocks cut from arenas of whole huge pages. All members may be called from any thread, and after
// a fork.
//
// A small block keeps its size when it is freed, and serves requests of that size. Threads share
// out what they compute by the same rule each time: so every one of them writes to the lines that
// it wrote before, and need not wait for the cache of another core to let go of them. A large block
// has left all caches by then: it joins its free neighbours, and the smallest that fits is taken.
// So are small ones when the bound forbids another arena.
//
// The bound: an arena is mapped only if all of them then hold at most twice the recent peak, or one
// huge page; arenas without a block in use are unmapped as soon as they exceed it.
class Pool {
 public:
  struct Block {
    Pool* pool;
    char* address;
    size_t bytes;
    bool free, sized;       // sized: for requests of its size only
    Block *before, *after;  // neighbours in the arena
  };
  struct Usage {
    size_t in_use, held, peak;  // bytes
  };

  // Uninitialised, aligned to 4 KB; null where the bound or the system forbids it.
  Block* take(size_t bytes);
  void give(Block* block);
  // Unmaps the arenas without a block in use.
  void release();
  Usage usage();

  // Around a fork, so that the child finds the pool in order.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  size_t limit(size_t in_use) const;
  Block* find(size_t bytes) const;
  bool fits(size_t bytes) const;
  Block* grow(size_t bytes);
  void split(Block* block, size_t bytes);
  Block* join_neighbours(Block* block);
  void join(Block* block, Block* after);
  void join_all();
  void trim(size_t limit);
  void insert(Block* block) { free_.emplace(block->bytes, block); }
  void erase(Block* block) { free_.erase({block->bytes, block}); }

  std::mutex mutex_;
  std::set<std::pair<size_t, Block*>> free_;
  size_t in_use_ = 0, held_ = 0;
  RecentPeak peak_;
};

}  // namespace fastres::cpu
