#include "elbo_finalize.cuh"

namespace elbo {

void elbo_finalize(
    const ChunkedBatch& batch, const Partials& partials, const Options& options, const Outputs& outputs,
    cudaStream_t stream) {
  const double scale = reduction_weight(options, batch);
  const FinalizeArguments args = {
      batch.size, batch.data.dims, scale, partials, batch.data_chunks.per_sample, batch.latent_chunks.per_sample,
      options,    outputs};
  const auto kernel = batch.is_double ? elbo_finalize_kernel<double> : elbo_finalize_kernel<float>;
  launch("elbo_finalize", kernel, args, 1, kFinalizeThreads, stream);
}

}  // namespace elbo
