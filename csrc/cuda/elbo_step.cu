#include "elbo_step.cuh"

namespace elbo {
namespace {

bool one_block_of_memory(const Span& span, const Data& data, int64_t batch) {
  const bool dense = batch == 1 || span.batch_stride == data.dims;
  return dense && reinterpret_cast<uintptr_t>(span.base) % 16 == 0;
}

template <class F>
void with_step_kernel(const Batch& batch, F f) {
  with_types(batch, [&](auto types) {
    using Of = decltype(types);
    if constexpr (std::is_same_v<typename Of::A, float>) f(elbo_step_kernel<typename Of::R, typename Of::T>);
  });
}

}  // namespace

StepPlan elbo_step_plan(const ChunkedBatch& batch, const Options& options, const Gradients& gradients) {
  const Data& data = batch.data;
  if (options.sigma_mode != kBatch || batch.is_double || data.dims == 0) return {};
  if (!keeps_slopes(data, gradients) || limits_samples(options.limit_mode)) return {};
  if (!one_block_of_memory(data.recon, data, batch.size) || !one_block_of_memory(data.target, data, batch.size))
    return {};
  const int64_t vector = 16 / data.recon.itemsize;
  if (batch.size * data.dims % vector != 0) return {};
  StepPlan plan = step_plan(
      batch.size * data.dims, batch.size * batch.latents.dims, static_cast<int>(vector), multiprocessors(),
      shared_for_differences(), is_mixed(data) ? 0 : kHeld);
  if (!plan.fits) return plan;
  // A grid barrier needs every block on the device at once: asked, not hoped for.
  with_step_kernel(batch, [&](auto kernel) {
    plan.fits = plan.data_blocks + plan.latent_blocks <= blocks_at_once(kernel, kStepThreads, plan.shared_bytes);
  });
  return plan;
}

void elbo_step(
    const ChunkedBatch& batch, const StepPlan& plan, const Options& options, const Number& grad_scale,
    const Partials& partials, double* workspace, const Outputs& outputs, const Gradients& gradients,
    cudaStream_t stream) {
  const double scale = reduction_weight(options, batch);
  const StepArguments args = {
      {batch, scale, nullptr, options, {grad_scale, {}, {}}, gradients, true, wants_latents(gradients)},
      outputs,
      partials,
      plan,
      batch.size * batch.data.dims,
      workspace + 2,
      workspace};
  with_step_kernel(batch, [&](auto kernel) {
    launch(
        "elbo_step", kernel, args, plan.data_blocks + plan.latent_blocks, kStepThreads, stream, plan.shared_bytes,
        true);
  });
}

}  // namespace elbo
