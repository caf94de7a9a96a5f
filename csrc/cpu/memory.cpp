#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <map>
#include <mutex>
#include <vector>

namespace elbo_memory {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kStep = std::size_t{64} << 10;

std::size_t rounded_up(std::size_t bytes, std::size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// Blocks have few different sizes, so that sequences of nearly equal ones, too, find them again.
std::size_t capacity_for(std::size_t bytes) {
  return rounded_up(bytes, bytes < kHugePage ? kStep : kHugePage);
}

// Straight from the system, so that what is freed is given back to it. Large ones on huge pages, which there are 512
// times fewer of: the first touch of each costs a fault, and later ones may miss the TLB.
Block* allocate(std::size_t capacity) {
  const std::size_t slack = capacity < kHugePage ? 0 : kHugePage;  // to begin at a huge page
  void* mapped = mmap(nullptr, capacity + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* data = static_cast<char*>(mapped);
  if (slack) {
    char* const begin = data;
    data = reinterpret_cast<char*>(rounded_up(reinterpret_cast<uintptr_t>(begin), kHugePage));
    const std::size_t before = data - begin, after = slack - before;
    if (before) munmap(begin, before);
    if (after) munmap(data + capacity, after);
#ifdef MADV_HUGEPAGE
    madvise(data, capacity, MADV_HUGEPAGE);
#endif
  }
  return new Block{data, capacity, 0};
}

void release(const std::vector<Block*>& blocks) {
  for (Block* block : blocks) {
    munmap(block->data, block->capacity);
    delete block;
  }
}

struct Pool {
  using Free = std::multimap<std::size_t, Block*>;  // by capacity; of equals the one freed last comes last

  std::mutex mutex;
  Free free;
  std::size_t held = 0, limit = std::size_t{256} << 20;
  unsigned long long clock = 0;

  Block* pop(Free::iterator at) {
    Block* block = at->second;
    free.erase(at);
    held -= block->capacity;
    return block;
  }

  void push(Block* block) {
    block->freed = ++clock;
    free.emplace(block->capacity, block);
    held += block->capacity;
  }

  // Takes blocks out, the longest unused first, until no more than `most` bytes are held.
  std::vector<Block*> excess(std::size_t most) {
    std::vector<Block*> out;
    while (held > most) {
      const auto older = [](const auto& a, const auto& b) { return a.second->freed < b.second->freed; };
      out.push_back(pop(std::min_element(free.begin(), free.end(), older)));
    }
    return out;
  }
};

// Never destroyed: tensors are freed after the destructors of statics too.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

}  // namespace

Block* take(std::size_t bytes) {
  const std::size_t capacity = capacity_for(bytes);
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (p.limit == 0) return nullptr;
    // Of exactly this size: a training loop asks for the same sizes in each step, and a larger block may be wanted
    // next. The last one, which may still be in the cache.
    const auto after = p.free.upper_bound(capacity);
    if (after != p.free.begin() && std::prev(after)->first == capacity) return p.pop(std::prev(after));
  }
  if (Block* block = allocate(capacity)) return block;
  fused_elbo_cpu_pool_empty();  // it may hold what is missing
  return allocate(capacity);
}

void give_back(Block* block) {
  std::vector<Block*> out;
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (block->capacity <= p.limit) {
      out = p.excess(p.limit - block->capacity);
      p.push(block);
    } else {
      out.push_back(block);
    }
  }
  release(out);
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
  std::vector<elbo_memory::Block*> out;
  {
    auto& p = elbo_memory::pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    out = p.excess(0);
  }
  elbo_memory::release(out);
}

EXPORT long long fused_elbo_cpu_last_level_cache() {
  return static_cast<long long>(elbo_memory::last_level_cache());
}
