// The CUDA kernels, one launch function per stage, without tensors: bindings.cpp turns tensors into these structures,
// which are also what a kernel is passed. Everything a pointer names lies on the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../elbo_math.h"
#include "../span.h"
#include "step_plan.h"

namespace elbo {

// A sample is cut into pieces, each the work of one warp and one partial sum. Their number depends on the sizes alone,
// so sums are the same on every device.
struct Pieces {
  int64_t size = 0, per_sample = 0, count = 0;
};

Pieces pieces_of(int64_t dims, int64_t batch);

// log σ where it varies inside a sample. Element k's lies at Σ k / divisor % size · stride over the levels, each a run
// of dimensions over which it is not repeated; without levels it lies as the data do,
// as it must where a sample has more elements than 32 bits count.
struct Inside {
  static constexpr int kMaxLevels = 4;
  struct Level {
    uint32_t divisor, size;
    int64_t stride;
  };

  Span values;
  int levels = 0;
  Level level[kMaxLevels] = {};
};

struct Data {
  int64_t dims = 0;  // elements of a sample; 0: no data
  Pieces pieces;
  Span recon, target;
  bool has_log_sigma = false;
  Inside log_sigma;
};

struct Latents {
  int64_t dims = 0;  // elements of a sample; 0: no latents
  Pieces pieces;
  Span mu, logvar;
  bool has_prior = false;
  Span prior_mu, prior_logvar;
  double free_bits = 0;
};

// Data are of the dtypes (x, x) or (half, float), computed in float; or all double. Latents are of any dtypes.
struct Batch {
  int64_t size = 0;
  bool is_double = false;
  Data data;
  Latents latents;
};

// One number, or one for each sample: from a tensor, or, where that has no base, `value`.
struct Number {
  Span tensor;  // of batch stride 0 where one value serves all
  double value = 0;
};

struct Knobs {
  int64_t sigma_mode = kGiven;
  bool softclip = false;
  Number log_sigma;  // where σ is given, and does not vary inside a sample
  double min_log_sigma = 0;
  Number beta;
  bool has_capacity = false;
  Number capacity;
  int64_t reduction = kSum;
};

// Sums of the pieces, [batch, per_sample], of the compute type; `clamped` is `kl` where there are no free bits.
struct Partials {
  void *s = nullptr, *kl = nullptr, *clamped = nullptr;
};

// Of the compute type. Without `loss` only stats are written.
struct Outputs {
  void *loss = nullptr, *distortion = nullptr, *rate = nullptr, *sigma = nullptr;
  bool sigma_each = false;  // sigma has a value for each sample
  void* stats = nullptr;    // [3, batch + 1]: S, KL, clamped KL; their sums in the last column
};

struct GradOutputs {
  Number loss, distortion, rate;
  bool equal = true;  // loss and distortion weigh every sample alike
};

// Where gradients go, dense; a span without a base is not wanted.
struct Gradients {
  Span recon, target, mu, logvar, prior_mu, prior_logvar;
  Span element_log_sigma;  // of every element, in recon's order: of target's dtype, or of the compute type
  Span log_sigma, beta;    // O(B)
  bool log_sigma_each = false, beta_each = false;
};

inline bool wants_data(const Gradients& g) {
  return g.recon.base || g.target.base || g.element_log_sigma.base;
}

inline bool wants_latents(const Gradients& g) {
  return g.mu.base || g.logvar.base || g.prior_mu.base || g.prior_logvar.base;
}

void elbo_stats(const Batch& batch, const Partials& partials, cudaStream_t stream);

void elbo_finalize(
    const Batch& batch, const Partials& partials, const Knobs& knobs, const Outputs& outputs, cudaStream_t stream);

void elbo_grads(
    const Batch& batch, const void* stats, const Knobs& knobs, const GradOutputs& grad_outputs,
    const Gradients& gradients, cudaStream_t stream);

// Those that are O(B).
inline Gradients small_alone(const Gradients& g) {
  Gradients small;
  small.log_sigma = g.log_sigma;
  small.log_sigma_each = g.log_sigma_each;
  small.beta = g.beta;
  small.beta_each = g.beta_each;
  return small;
}

// Loss and gradients of grad_scale · loss in one launch. `fits` is false where the batch, or what is asked, is not for
// it: then the three above do.
StepPlan elbo_step_plan(const Batch& batch, const Knobs& knobs);

// partials: of the latents. workspace: data_blocks + 2 numbers. outputs: without stats.
void elbo_step(
    const Batch& batch, const StepPlan& plan, const Knobs& knobs, const Number& grad_scale, const Partials& partials,
    double* workspace, const Outputs& outputs, const Gradients& gradients, cudaStream_t stream);

// The same in one pass where σ is given or each sample's own, in two launches: elbo_finalize follows, and where
// gradients of σ or β are asked for, elbo_grads for these alone. partials.s: of pieces, or of samples where each has
// its own σ.
bool elbo_step_each_fits(const Batch& batch, const Knobs& knobs);

void elbo_step_each(
    const Batch& batch, const Knobs& knobs, const Number& grad_scale, const Partials& partials,
    const Gradients& gradients, cudaStream_t stream);

}  // namespace elbo
