// How a batch is cut into tasks for the threads, and log σ inside a sample into runs.
#pragma once

#include "../errors.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "elbo.h"
#include "simd.h"

namespace elbo {

// Elements of one partial sum. Cut by index, never by what a thread is given, so that sums do not depend on the number
// of threads; a multiple of kBlock.
constexpr int64_t kChunk = 16 * kBlock;
constexpr int64_t kGrain = 32768;   // elements of data worth a thread of their own
constexpr int64_t kLatentCost = 4;  // elements of data that take as long as one latent, with its exp

inline int64_t chunks(int64_t dims) {
  return (dims + kChunk - 1) / kChunk;
}

// Calls f(sample, chunk) for [begin, end) of all of them.
template <class F>
ELBO_INLINE void for_tasks(int64_t begin, int64_t end, int64_t per_sample, F f) {
  for (int64_t task = begin; task < end; ++task) f(task / per_sample, task % per_sample);
}

// Calls of_data(begin, end) and of_latents(begin, end) for each thread's share of the data's tasks and of the latents',
// in parallel: both in one region, since starting the threads takes as long as a small batch does.
template <class D, class L>
inline void for_shares(int64_t batch, int64_t data_dims, int64_t latent_dims, D of_data, L of_latents) {
  const int64_t data_tasks = batch * chunks(data_dims), latent_tasks = batch * chunks(latent_dims);
  const int64_t work = batch * (data_dims + kLatentCost * latent_dims);
  const int64_t shares = std::clamp<int64_t>(work / kGrain, 1, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      of_data(data_tasks * k / shares, data_tasks * (k + 1) / shares);
      of_latents(latent_tasks * k / shares, latent_tasks * (k + 1) / shares);
    }
  });
}

// A share whose tasks are done one by one, as f(sample, chunk).
template <class F>
inline auto each(int64_t dims, F f) {
  return [f, dims](int64_t begin, int64_t end) { for_tasks(begin, end, chunks(dims), f); };
}

// The same for a second pass over the data: the end of a thread's share first, which the pass before has left in the
// last-level cache. By a number of tasks, each time forwards, since memory is read ahead of a loop in one direction.
template <class F>
inline auto each_again(int64_t dims, F f) {
  return [f, dims](int64_t begin, int64_t end) {
    constexpr int64_t kTasks = 64;
    for (int64_t stop = end, start; stop > begin; stop = start) {
      start = std::max(begin, stop - kTasks);
      for_tasks(start, stop, chunks(dims), f);
    }
  };
}

inline void nothing(int64_t, int64_t) {}

// Sums each sample's partial sums, in the order of its chunks.
inline std::vector<double> sums_of(int64_t batch, const std::vector<double>& partials) {
  std::vector<double> sums(batch, 0.0);
  const int64_t count = static_cast<int64_t>(partials.size()) / batch;
  for (int64_t i = 0; i < batch * count; ++i) sums[i / count] += partials[i];
  return sums;
}

// Calls f(first, n) for the blocks of a chunk.
template <class F>
ELBO_INLINE void for_blocks(int64_t chunk, int64_t dims, F f) {
  const int64_t end = std::min(dims, (chunk + 1) * kChunk);
  for (int64_t d = chunk * kChunk; d < end; d += kBlock) f(d, std::min(kBlock, end - d));
}

// Cuts elements [first, first + n) of a sample into runs along its innermost dimension and calls
// f(offset into a sample's values, elements before the run, length, stride).
template <class F>
inline void for_runs(const Broadcast& broadcast, int64_t first, int64_t n, F f) {
  const Broadcast::Dim& inner = broadcast.dims[0];
  const bool repeats = inner.divisor > 1;  // along the data's innermost dimensions
  const int64_t run = repeats ? inner.divisor : inner.size, stride = repeats ? 0 : inner.stride;
  for (int64_t done = 0; done < n;) {
    const int64_t element = first + done, length = std::min(run - element % run, n - done);
    f(offset_of(broadcast, element), done, length, stride);
    done += length;
  }
}

// The values of a block, log σ or weights, gathered if they are broadcast.
template <class A>
inline const A* read_broadcast(const Broadcast& broadcast, int64_t sample, int64_t first, int64_t n, A* scratch) {
  const Span& values = broadcast.values;
  if (broadcast.rank == 0) return read(values, sample, first, n, scratch);
  for_runs(broadcast, first, n, [&](int64_t offset, int64_t done, int64_t length, int64_t stride) {
    A one;
    if (stride == 0) {
      std::fill_n(scratch + done, length, *read(values, sample, offset, 1, &one));
    } else if (stride == 1) {
      const A* p = read(values, sample, offset, length, scratch + done);
      if (p != scratch + done) std::copy_n(p, length, scratch + done);
    } else {
      for (int64_t k = 0; k < length; ++k) scratch[done + k] = *read(values, sample, offset + k * stride, 1, &one);
    }
  });
  return scratch;
}

}  // namespace elbo
