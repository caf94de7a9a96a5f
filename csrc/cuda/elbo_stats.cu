#include "elbo_stats.cuh"

namespace elbo {

void elbo_stats(const ChunkedBatch& batch, const Partials& partials, cudaStream_t stream) {
  const StatsArguments args = {batch, partials};
  const int64_t chunks = batch.data_chunks.count + batch.latent_chunks.count;
  with_types(batch, [&](auto types) {
    using A = typename decltype(types)::A;
    using R = typename decltype(types)::R;
    using T = typename decltype(types)::T;
    const auto kernel =
        batch.data.has_log_sigma ? elbo_stats_kernel<A, R, T, true> : elbo_stats_kernel<A, R, T, kIsMixed<T>>;
    const int64_t blocks = blocks_for(chunks, blocks_at_once(kernel, kThreads, 0));
    launch("elbo_stats", kernel, args, blocks, kThreads, stream);
  });
}

}  // namespace elbo
