// How a batch is cut for the warps of the two passes, and how many blocks they come in: arithmetic alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace elbo {

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;  // of a block, except in finalize and in one pass

constexpr int64_t kRow = 256;      // elements in 128 bits of a warp's lanes, of a half dtype; of float in two of them
constexpr int64_t kVector = 8;     // elements in 128 bits of the narrowest dtype
constexpr int64_t kLeast = 512;    // elements of a chunk: with fewer, the sum and the factors take longer than the data
constexpr int64_t kMost = 4096;    // elements: what a sum costs is little by then
constexpr int64_t kEnough = 2048;  // chunks: as many warps keep a GPU's memory busy
constexpr int64_t kMany = 8192;    // chunks: with more, finalize takes longer to add them up

constexpr int64_t divided_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// A sample is cut into chunks, each the work of one warp and one partial sum. Their number depends on the sizes alone,
// so sums are the same on every device.
struct Chunks {
  int64_t size = 0, per_sample = 0, count = 0;
};

// A small batch has small chunks, or there would be too few. Those of a sample are as long as one another, up to a row.
constexpr Chunks chunks_of(int64_t dims, int64_t batch) {
  if (dims == 0) return {};
  const int64_t elements = dims * batch;
  const int64_t longest = std::max(std::clamp(elements / kEnough, kLeast, kMost), elements / kMany);
  const int64_t size = kRow * divided_up(divided_up(dims, divided_up(dims, longest)), kRow);
  const int64_t per_sample = divided_up(dims, size);
  return {size, per_sample, per_sample * batch};
}

// How many neighbours of a run, which want one sum, are a chunk: no more than `longest`. 0 where no size is worth a
// warp and lets each chunk begin on 128 bits if the sample does.
constexpr int64_t segment_of(int64_t run, int64_t longest) {
  if (longest == 0) return 0;
  for (int64_t parts = divided_up(run, longest); run / parts >= kRow; ++parts) {
    if (run % (parts * kVector) == 0) return run / parts;
  }
  return 0;
}

// Blocks for so many chunks, of which a warp takes one after the other. No more than are `resident`, so that none
// starts when the others are done, and so few that each warp has as many chunks as the next: no rest is left for a few
// of them.
constexpr int64_t blocks_for(int64_t chunks, int64_t resident, int threads = kThreads) {
  const int64_t warps = threads / kWarpSize, rounds = divided_up(chunks, resident * warps);
  return rounds == 0 ? 0 : divided_up(chunks, rounds * warps);
}

}  // namespace elbo
