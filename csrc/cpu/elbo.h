// The CPU kernels, one function per stage, without tensors: bindings.cpp turns tensors into the structures of
// ../elbo.h. A, float or double, is what is computed with.
#pragma once

#include <cstdint>
#include <vector>

#include "../elbo.h"
#include "convert.h"

namespace elbo {

struct Stats {
  std::vector<double> a, kl, kl_clamped;  // one value per sample
  std::vector<double> weights;            // n_i, where elements have weights
};

// Data or latents without dims are left out.
template <class A>
Stats elbo_stats(const Batch& batch, const Number& extra_error);

// A of each sample, with what is added to it.
std::vector<double> with_extra_error(std::vector<double> a, const Number& extra_error);

template <class A>
void elbo_finalize(const Stats& stats, const Batch& batch, const Options& options, const Outputs& outputs);

// The factors of each sample, with the term of a σ that the batch shares; and of the gradients those that are O(B).
std::vector<Factors> elbo_factors(
    const Stats& stats, const Batch& batch, const Options& options, const GradOutputs& grad_outputs,
    const Gradients& gradients);

// Factors.recon_scale of a sample whose σ is its own (a given one, or its optimum), from its A alone.
double own_recon_scale(int64_t sample, double a, const Batch& batch, const Options& options, double grad_scale);

template <class A>
void elbo_grads(const Batch& batch, const std::vector<Factors>& factors, const Gradients& gradients);

// All three stages but finalize, for the gradients of grad_scale · loss.
template <class A>
Stats elbo_step(const Batch& batch, const Options& options, double grad_scale, const Gradients& gradients);

// What comes back from a tensor of A: forward and grads see the same numbers.
template <class A>
Stats as_stored(Stats stats) {
  for (auto* row : {&stats.a, &stats.kl, &stats.kl_clamped, &stats.weights}) {
    for (double& value : *row) value = static_cast<A>(value);
  }
  return stats;
}

// Σ max(KL, free_bits) of each sample: over all latents, or, [batch, levels], over those of each level.
template <class A>
std::vector<double> elbo_levels(int64_t batch, const std::vector<Latents>& levels, bool per_level);

// grads: ∂L/∂ the rates of each level.
template <class A>
void elbo_levels_grads(
    int64_t batch, const std::vector<Latents>& levels, const std::vector<Number>& grads,
    const std::vector<Gradients>& gradients);

}  // namespace elbo
