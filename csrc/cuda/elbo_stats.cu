#include "elbo_stats.cuh"

namespace elbo {

constexpr int64_t kChunk = 4096;  // elements: 16 turns of a warp's 128-bit loads of float, so that a sum costs little
constexpr int64_t kMany = 8192;   // warps that fill any GPU; with more chunks than that, chunks are longer instead

Chunks chunks_of(int64_t dims, int64_t batch) {
  if (dims == 0) return {};
  const int64_t shortest = (dims + kChunk - 1) / kChunk;
  const int64_t size = kChunk * std::min(shortest, (shortest * batch + kMany - 1) / kMany);
  const int64_t per_sample = (dims + size - 1) / size;
  return {size, per_sample, per_sample * batch};
}

void elbo_stats(const ChunkedBatch& batch, const Partials& partials, cudaStream_t stream) {
  const StatsArguments args = {batch, partials};
  const int64_t blocks = blocks_for(batch.data_chunks.count + batch.latent_chunks.count);
  with_types(batch, [&](auto types) {
    using A = typename decltype(types)::A;
    using R = typename decltype(types)::R;
    using T = typename decltype(types)::T;
    const auto kernel =
        batch.data.has_log_sigma ? elbo_stats_kernel<A, R, T, true> : elbo_stats_kernel<A, R, T, kIsMixed<T>>;
    launch("elbo_stats", kernel, args, blocks, kThreads, stream);
  });
}

}  // namespace elbo
