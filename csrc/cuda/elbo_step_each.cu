#include "elbo_step_each.cuh"

namespace elbo {

bool elbo_step_each_fits(const ChunkedBatch& batch, const Options& options, const Gradients& gradients) {
  const Data& data = batch.data;
  if (batch.is_double || data.dims == 0 || data.has_log_sigma || options.limit_mode != kNoLimit) return false;
  if (options.sigma_mode == kGiven) return !data.has_weight || options.reduction != kMean;
  if (options.sigma_mode != kImage || !keeps_slopes(data, gradients)) return false;
  // A block for each sample: with few of them the multiprocessors that have none cost more than the second pass.
  return batch.data.dims * 4 <= shared_for_differences() && 5 * batch.size >= 3 * multiprocessors();
}

void elbo_step_each(
    const ChunkedBatch& batch, const Options& options, const Number& grad_scale, const Partials& partials,
    const Gradients& gradients, cudaStream_t stream) {
  const bool own = options.sigma_mode == kImage;
  const double scale = reduction_weight(options, batch);
  StepEachArguments args = {
      {batch, scale, nullptr, options, {grad_scale, {}, {}}, gradients, true, wants_latents(gradients)}, partials, 0};
  const int64_t shared = own ? batch.data.dims * 4 : 0;
  with_types(batch, [&](auto types) {
    using Of = decltype(types);
    if constexpr (std::is_same_v<typename Of::A, float>) {
      using R = typename Of::R;
      using T = typename Of::T;
      const auto kernel = own ? elbo_step_each_kernel<R, T, true> : elbo_step_each_kernel<R, T, false>;
      const int64_t resident = blocks_at_once(kernel, kStepThreads, shared);
      args.data_blocks = own ? static_cast<int>(std::min(batch.size, resident)) : 0;
      const int64_t chunks = (own ? 0 : batch.data_chunks.count) + batch.latent_chunks.count;
      const int64_t blocks = args.data_blocks + blocks_for(chunks, resident, kStepThreads);
      launch("elbo_step_each", kernel, args, blocks, kStepThreads, stream, shared);
    }
  });
}

}  // namespace elbo
