// The CPU kernels, one function per stage, without tensors: bindings.cpp turns tensors into these structures.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../elbo_math.h"
#include "convert.h"

namespace elbo {

// log σ where it varies inside a sample, addressed through the data's dimensions in memory order.
struct Broadcast {
  Span values;
  bool dense = false;            // laid out like recon: the dimensions are not needed
  std::vector<int64_t> sizes;    // outermost first; neighbours that can be walked as one are merged
  std::vector<int64_t> strides;  // in elements of log σ, 0 where it repeats
  int64_t numel = 0;
};

struct Data {
  int64_t dims = 0;  // elements of a sample; 0: no data
  Span recon, target;
  const Broadcast* log_sigma = nullptr;
};

struct Latents {
  int64_t dims = 0;  // elements of a sample; 0: no latents
  Span mu, logvar;
  bool has_prior = false;
  Span prior_mu, prior_logvar;
  std::optional<double> free_bits;
};

// The arguments of the O(B) arithmetic. log_sigma and beta hold 0 values (use the number), 1, or one per sample.
struct Knobs {
  int64_t sigma_mode = 0;
  bool softclip = false;
  double log_sigma_value = 0, min_log_sigma = 0, beta_value = 1;
  std::optional<double> capacity;
  int64_t reduction = 0;
  std::vector<double> log_sigma, beta;
};

struct Stats {
  std::vector<double> s, kl, kl_clamped;  // one value per sample
};

struct Outputs {
  std::vector<double> loss, distortion, rate, sigma;  // 1 or B values; sigma 0 where it varies inside a sample
};

// ∂L/∂loss_i and so on: 0 values (no gradient), 1, or one per sample.
struct GradOutputs {
  std::vector<double> loss, distortion, rate;
};

// What each sample's elements are multiplied by, and the gradients that are O(B) themselves.
struct Weights {
  std::vector<double> error;         // a_i; where σ varies inside a sample, ∂L/∂distortion_i
  std::vector<double> through_loss;  // the part of b_i that free_bits can mask
  std::vector<double> through_rate;
  std::vector<double> log_sigma, beta;  // as many values as the inputs have
};

// Where gradients go; a span without a base is not wanted.
struct Gradients {
  Span recon, target, mu, logvar, prior_mu, prior_logvar;
  Span log_sigma;                                      // where log σ is dense
  std::vector<double>* log_sigma_broadcast = nullptr;  // where it is broadcast: numel values
  bool past_caches = false;                            // those of the data are too large to be found there again
  bool latents_past_caches = false;                    // those of the latents are
};

// Data or latents without dims are left out.
template <class A>
Stats elbo_stats(int64_t batch, const Data& data, const Latents& latents);

Outputs elbo_finalize(const Stats& stats, int64_t data_dims, int64_t latent_dims, const Knobs& knobs);

Weights elbo_weights(
    const Stats& stats, int64_t data_dims, int64_t latent_dims, const Knobs& knobs, const GradOutputs& grad_outputs);

// Weights.error of a sample whose σ is its own (a given one, or its optimum), from its S alone.
double own_error_weight(
    int64_t sample, double s, int64_t batch, int64_t data_dims, const Knobs& knobs, double grad_scale);

template <class A>
void elbo_grads(
    int64_t batch, const Data& data, const Latents& latents, const Weights& weights, const Gradients& gradients);

struct Step {
  Stats stats;  // as read back from a tensor of A
  Weights weights;
};

// All three stages, for the gradients of grad_scale · loss.
template <class A>
Step elbo_step(
    int64_t batch, const Data& data, const Latents& latents, const Knobs& knobs, double grad_scale,
    const Gradients& gradients);

// Σ over the levels of max(KL, free_bits), for each sample.
template <class A>
std::vector<double> elbo_levels(int64_t batch, const std::vector<Latents>& levels);

// `weights`: ∂L/∂ that sum, one for all or one per sample.
template <class A>
void elbo_levels_grads(
    int64_t batch, const std::vector<Latents>& levels, const std::vector<double>& weights,
    const std::vector<Gradients>& gradients);

}  // namespace elbo
