#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <list>
#include <mutex>

namespace elbo_memory {
namespace {

constexpr std::size_t kPage = std::size_t{2} << 20;  // a huge page

std::size_t rounded_up(std::size_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}

// Straight from the system, so that what is freed is given back to it. On huge pages, which there are 512 times fewer
// of: the first touch of each costs a fault, and later ones may miss the TLB.
Block* allocate(std::size_t capacity) {
  void* mapped = mmap(nullptr, capacity + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  char* const data = reinterpret_cast<char*>(rounded_up(reinterpret_cast<uintptr_t>(begin)));
  const std::size_t before = data - begin, after = kPage - before;
  if (before) munmap(begin, before);
  if (after) munmap(data + capacity, after);
#ifdef MADV_HUGEPAGE
  madvise(data, capacity, MADV_HUGEPAGE);
#endif
  return new Block{data, capacity};
}

void release(Block* block) {
  munmap(block->data, block->capacity);
  delete block;
}

struct Pool {
  std::mutex mutex;
  std::list<Block*> free;  // the longest unused first
  std::size_t held = 0, limit = std::size_t{256} << 20;

  Block* pop(std::list<Block*>::iterator at) {
    Block* block = *at;
    free.erase(at);
    held -= block->capacity;
    return block;
  }
};

// Never destroyed: tensors are freed after the destructors of statics too.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

// Takes blocks out, the longest unused first, until no more than `most` bytes are held.
std::list<Block*> excess(Pool& p, std::size_t most) {
  std::list<Block*> out;
  while (p.held > most) out.push_back(p.pop(p.free.begin()));
  return out;
}

}  // namespace

Block* take(std::size_t bytes) {
  const std::size_t capacity = rounded_up(bytes);
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (p.limit == 0) return nullptr;
    // Of exactly this size: a training loop asks for the same sizes in each step, and a larger block may be wanted
    // next. The last one first, which may still be in the cache.
    for (auto at = p.free.end(); at != p.free.begin();) {
      if ((*--at)->capacity == capacity) return p.pop(at);
    }
  }
  return allocate(capacity);
}

void give_back(Block* block) {
  std::list<Block*> out;
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (block->capacity <= p.limit) {
      out = excess(p, p.limit - block->capacity);
      p.free.push_back(block);
      p.held += block->capacity;
    } else {
      out.push_back(block);
    }
  }
  for (Block* one : out) release(one);
}

// From Linux's list of caches: sysconf gives the sum of a machine's caches on some processors.
std::size_t last_level_cache() {
  static const std::size_t bytes = [] {
    std::size_t kibibytes = 0;
    for (int index = 0; index < 8; ++index) {
      char path[64], unit;
      std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
      std::FILE* const file = std::fopen(path, "r");
      if (file == nullptr) continue;
      std::size_t size;
      if (std::fscanf(file, "%zu%c", &size, &unit) == 2 && unit == 'K') kibibytes = std::max(kibibytes, size);
      std::fclose(file);
    }
    return kibibytes ? kibibytes << 10 : std::size_t{32} << 20;
  }();
  return bytes;
}

}  // namespace elbo_memory

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void fused_elbo_cpu_pool_limit(long long bytes) {
  auto& p = elbo_memory::pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.limit = static_cast<std::size_t>(bytes);
}

EXPORT long long fused_elbo_cpu_pool_held() {
  auto& p = elbo_memory::pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return static_cast<long long>(p.held);
}

EXPORT void fused_elbo_cpu_pool_empty() {
  std::list<elbo_memory::Block*> out;
  {
    auto& p = elbo_memory::pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    out = elbo_memory::excess(p, 0);
  }
  for (elbo_memory::Block* one : out) elbo_memory::release(one);
}

EXPORT long long fused_elbo_cpu_last_level_cache() {
  return static_cast<long long>(elbo_memory::last_level_cache());
}
