#include "elbo_stats.cuh"

namespace elbo {

constexpr int64_t kPiece = 4096;  // elements: 16 turns of a warp's 128-bit loads of float, so that a sum costs little
constexpr int64_t kMany = 8192;   // warps that fill any GPU; with more pieces than that, pieces are longer instead

Pieces pieces_of(int64_t dims, int64_t batch) {
  if (dims == 0) return {};
  const int64_t shortest = (dims + kPiece - 1) / kPiece;
  const int64_t size = kPiece * std::min(shortest, (shortest * batch + kMany - 1) / kMany);
  const int64_t per_sample = (dims + size - 1) / size;
  return {size, per_sample, per_sample * batch};
}

void elbo_stats(const Batch& batch, const Partials& partials, cudaStream_t stream) {
  const StatsArguments args = {batch, partials};
  const int64_t blocks = blocks_for(batch.data.pieces.count + batch.latents.pieces.count);
  with_types(batch, [&](auto types) {
    using A = typename decltype(types)::A;
    using R = typename decltype(types)::R;
    using T = typename decltype(types)::T;
    const auto kernel = batch.data.has_log_sigma ? elbo_stats_kernel<A, R, T, true> : elbo_stats_kernel<A, R, T, false>;
    launch("elbo_stats", kernel, args, blocks, kThreads, stream);
  });
}

}  // namespace elbo
