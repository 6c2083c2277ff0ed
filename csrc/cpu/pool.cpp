#include "pool.h"

#include <vector>

#include "memory.h"

namespace fastres::cpu {
namespace {

constexpr size_t kGrain = 4096;
constexpr size_t kSmall = kHugePage;

constexpr size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

size_t Pool::limit(size_t in_use) const {
  return std::max(2 * std::max(peak_.bytes(), in_use), kHugePage);
}

Pool::Block* Pool::take(size_t wanted) {
  const size_t bytes = rounded(std::max(wanted, size_t{1}), kGrain);
  const std::lock_guard lock(mutex_);
  Block* block = find(bytes);
  if (block == nullptr && fits(bytes)) block = grow(bytes);
  if (block == nullptr) {  // before an arena is given back for a new one, which costs page faults
    join_all();
    block = find(bytes);
    if (block == nullptr) block = grow(bytes);
  }
  if (block == nullptr) return nullptr;
  erase(block);
  split(block, bytes);
  block->free = false;
  in_use_ += bytes;
  peak_.note(in_use_);
  return block;
}

void Pool::give(Block* block) {
  const std::lock_guard lock(mutex_);
  in_use_ -= block->bytes;
  block->free = true;
  block->sized = block->bytes <= kSmall;
  insert(block->sized ? block : join_neighbours(block));
  trim(limit(in_use_));
}

void Pool::release() {
  const std::lock_guard lock(mutex_);
  trim(0);
}

Pool::Usage Pool::usage() {
  const std::lock_guard lock(mutex_);
  return {in_use_, held_, peak_.bytes()};
}

// The smallest free block that may serve.
Pool::Block* Pool::find(size_t bytes) const {
  for (auto it = free_.lower_bound({bytes, nullptr}); it != free_.end(); ++it) {
    if (!it->second->sized || it->first == bytes) return it->second;
  }
  return nullptr;
}

// Whether one more arena keeps within the bound, whatever else is held.
bool Pool::fits(size_t bytes) const {
  return held_ + rounded(bytes, kHugePage) <= limit(in_use_ + bytes);
}

// A free block of at least `bytes`, an arena of its own.
Pool::Block* Pool::grow(size_t bytes) {
  const size_t arena = rounded(bytes, kHugePage), most = limit(in_use_ + bytes);
  if (arena > most) return nullptr;
  trim(most - arena);
  if (held_ + arena > most) return nullptr;
  auto block = std::make_unique<Block>(Block{this, nullptr, arena, true, false, nullptr, nullptr});
  block->address = static_cast<char*>(map_pages(arena));
  if (block->address == nullptr) return nullptr;
  insert(block.get());
  held_ += arena;
  return block.release();
}

// Leaves what is over of a block that is in nobody's hands as a free block behind it.
void Pool::split(Block* block, size_t bytes) {
  if (block->bytes == bytes) return;
  auto* const rest = new Block{
      this, block->address + bytes, block->bytes - bytes, true, false, block, block->after};
  if (rest->after != nullptr) rest->after->before = rest;
  block->after = rest;
  block->bytes = bytes;
  insert(rest);
}

// A free block that is not among free_, with those beside it that are not sized.
Pool::Block* Pool::join_neighbours(Block* block) {
  if (Block* const after = block->after; after != nullptr && after->free && !after->sized) {
    erase(after);
    join(block, after);
  }
  if (Block* const before = block->before; before != nullptr && before->free && !before->sized) {
    erase(before);
    join(before, block);
    return before;
  }
  return block;
}

// No free block keeps its size.
void Pool::join_all() {
  std::vector<Block*> sized;
  for (const auto& [bytes, block] : free_) {
    if (block->sized) sized.push_back(block);
  }
  for (Block* const block : sized) erase(block);
  for (Block* const block : sized) block->sized = block->free = false;
  for (Block* const block : sized) {
    block->free = true;
    insert(join_neighbours(block));
  }
}

void Pool::join(Block* block, Block* after) {
  block->bytes += after->bytes;
  block->after = after->after;
  if (block->after != nullptr) block->after->before = block;
  delete after;
}

// Unmaps arenas without a block in use, the largest first, until no more than `limit` is held.
void Pool::trim(size_t limit) {
  if (held_ > limit) join_all();
  for (auto it = free_.end(); held_ > limit && it != free_.begin();) {
    Block* const block = (--it)->second;
    if (block->before != nullptr || block->after != nullptr) continue;
    unmap_pages(block->address, block->bytes);
    held_ -= block->bytes;
    it = free_.erase(it);
    delete block;
  }
}

}  // namespace fastres::cpu
