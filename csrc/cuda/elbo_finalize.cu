#include "elbo_finalize.cuh"

namespace elbo {

void elbo_finalize(
    const Batch& batch, const Partials& partials, const Knobs& knobs, const Outputs& outputs, cudaStream_t stream) {
  const int64_t dims = batch.data.dims ? batch.data.dims : batch.latents.dims;
  const double scale = reduction_weight(knobs.reduction, static_cast<double>(batch.size), static_cast<double>(dims));
  const FinalizeArguments args = {
      batch.size, batch.data.dims, scale, partials, batch.data.pieces.per_sample, batch.latents.pieces.per_sample,
      knobs,      outputs};
  const auto kernel = batch.is_double ? elbo_finalize_kernel<double> : elbo_finalize_kernel<float>;
  launch("elbo_finalize", kernel, args, 1, kFinalizeThreads, stream);
}

}  // namespace elbo
