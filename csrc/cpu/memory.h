// What the CPU kernels know of the machine's memory: a pool of it for large gradients, and the size of its last cache.
//
// Fresh memory is paid for page by page when it is first written, which costs more than the arithmetic of a gradient,
// and a large buffer that is freed goes back to the system. So the pool keeps what is freed, up to a limit in bytes,
// and hands it out again. Outside namespace elbo, which is compiled once for each instruction set: there is one pool.
#pragma once

#include <cstddef>

namespace elbo_memory {

constexpr std::size_t kSmallest = std::size_t{128} << 10;  // malloc keeps smaller blocks itself

struct Block {
  void* data;
  std::size_t capacity;
  unsigned long long freed;  // when, counted in blocks
};

// Thread-safe, as the others are. The memory has no defined contents. Null where the pool is off, or the system has no
// more.
Block* take(std::size_t bytes);

void give_back(Block* block);

// Bytes; of one that the processors here share, where it is known, else a common size.
std::size_t last_level_cache();

}  // namespace elbo_memory

// For Python, by ctypes. The limit holds from the next block that is given back; 0 turns the pool off.
extern "C" {
void fused_elbo_cpu_pool_limit(long long bytes);
long long fused_elbo_cpu_pool_held();
void fused_elbo_cpu_pool_empty();
long long fused_elbo_cpu_last_level_cache();
}
