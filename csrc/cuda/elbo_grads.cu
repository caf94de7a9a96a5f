#include "elbo_grads.cuh"

namespace elbo {

void elbo_grads(
    const ChunkedBatch& given, const void* stats, const Options& options, const GradOutputs& grad_outputs,
    const Gradients& gradients, cudaStream_t stream) {
  ChunkedBatch batch = given;
  if (gradients.segment) {  // each is the work of one warp, which adds it up
    const int64_t per_sample = batch.data.dims / gradients.segment;
    batch.data_chunks = {gradients.segment, per_sample, per_sample * batch.size};
  }
  const bool with_data = wants_data(gradients), with_latents = wants_latents(gradients);
  const int64_t chunks = (with_data ? batch.data_chunks.count : 0) + (with_latents ? batch.latent_chunks.count : 0);
  if (chunks == 0 && !wants_small(gradients)) return;
  const GradsArguments args = {
      batch, reduction_weight(options, batch), stats, options, grad_outputs, gradients, with_data, with_latents};
  with_types(batch, [&](auto types) {
    using A = typename decltype(types)::A;
    using R = typename decltype(types)::R;
    using T = typename decltype(types)::T;
    const auto kernel =
        batch.data.has_log_sigma ? elbo_grads_kernel<A, R, T, true> : elbo_grads_kernel<A, R, T, kIsMixed<T>>;
    const int64_t blocks = std::max<int64_t>(blocks_for(chunks, blocks_at_once(kernel, kThreads, 0)), 1);
    launch("elbo_grads", kernel, args, blocks, kThreads, stream);
  });
}

}  // namespace elbo
