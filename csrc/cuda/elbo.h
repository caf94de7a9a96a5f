// The CUDA kernels, one launch function per stage, without tensors: bindings.cpp turns tensors into the structures of
// ../elbo.h, which are also what a kernel is passed. Everything a pointer names lies on the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../elbo.h"
#include "schedule.h"
#include "step_plan.h"

namespace elbo {

// Data are of the dtypes (x, x) or (half, float), computed in float, or all double; or the target is of bytes. Latents
// and weights are of any dtypes.
struct ChunkedBatch : Batch {
  Chunks data_chunks, latent_chunks;
};

inline ChunkedBatch chunked(const Batch& batch) {
  return {batch, chunks_of(batch.data.dims, batch.size), chunks_of(batch.latents.dims, batch.size)};
}

// Sums of the chunks, [batch, per_sample], of the compute type; `clamped` is `kl` where there are no free bits, and
// `weights` null where there are none.
struct Partials {
  void *a = nullptr, *kl = nullptr, *clamped = nullptr, *weights = nullptr;
};

void elbo_stats(const ChunkedBatch& batch, const Partials& partials, cudaStream_t stream);

void elbo_finalize(
    const ChunkedBatch& batch, const Partials& partials, const Options& options, const Outputs& outputs,
    cudaStream_t stream);

void elbo_grads(
    const ChunkedBatch& batch, const void* stats, const Options& options, const GradOutputs& grad_outputs,
    const Gradients& gradients, cudaStream_t stream);

inline bool wants_small(const Gradients& g) {
  return g.log_sigma.base || g.beta.base || g.extra_error.base;
}

// Those that are O(B).
inline Gradients small_alone(const Gradients& g) {
  Gradients small;
  small.log_sigma = g.log_sigma;
  small.log_sigma_each = g.log_sigma_each;
  small.beta = g.beta;
  small.beta_each = g.beta_each;
  small.extra_error = g.extra_error;
  small.extra_error_each = g.extra_error_each;
  return small;
}

// Loss and gradients of grad_scale · loss in one launch. `fits` is false where the batch, or what is asked, is not for
// it: then the three above do.
StepPlan elbo_step_plan(const ChunkedBatch& batch, const Options& options, const Gradients& gradients);

// partials: of the latents. workspace: data_blocks + 2 numbers. outputs: without stats.
void elbo_step(
    const ChunkedBatch& batch, const StepPlan& plan, const Options& options, const Number& grad_scale,
    const Partials& partials, double* workspace, const Outputs& outputs, const Gradients& gradients,
    cudaStream_t stream);

// The same in one pass where σ is given or each sample's own, in two launches: elbo_finalize follows, and where
// gradients of σ, of β or of an extra error are asked for, elbo_grads for these alone. partials.a: of chunks, or of
// samples where each has its own σ.
bool elbo_step_each_fits(const ChunkedBatch& batch, const Options& options, const Gradients& gradients);

void elbo_step_each(
    const ChunkedBatch& batch, const Options& options, const Number& grad_scale, const Partials& partials,
    const Gradients& gradients, cudaStream_t stream);

}  // namespace elbo
