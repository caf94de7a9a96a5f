// Stage two, O(B) and in double: S and KL to loss, distortion, rate and σ; and the prologue of the gradients, which
// turns the same numbers into one factor per sample. A σ mode that is shared within a sample is added here.
#include <cmath>
#include <numeric>

#include "../elbo_math.h"
#include "elbo.h"

namespace elbo {
namespace {

double sum(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

// Values of which there may be none (use the default), one, or one per sample.
double at(const std::vector<double>& values, int64_t i, double none) {
  return values.empty() ? none : values[values.size() == 1 ? 0 : i];
}

// How far the batch's mean rate, as β sees it, is from the capacity.
double capacity_gap(const Stats& stats, const Knobs& knobs) {
  return sum(stats.kl_clamped) / static_cast<double>(stats.kl_clamped.size()) - *knobs.capacity;
}

// The σ of each sample, or the one of all: B or 1 of them; none where σ varies inside a sample.
std::vector<Sigma> sigmas(const Stats& stats, double dims, const Knobs& knobs) {
  std::vector<Sigma> result;
  const double batch = static_cast<double>(stats.s.size());
  switch (knobs.sigma_mode) {
    case kBatch:
      result.push_back(optimal_sigma(sum(stats.s), batch * dims, knobs.min_log_sigma, knobs.softclip));
      break;
    case kImage:
      for (double s : stats.s) result.push_back(optimal_sigma(s, dims, knobs.min_log_sigma, knobs.softclip));
      break;
    case kGiven:
      if (knobs.log_sigma.empty()) result.push_back(given_sigma(knobs.log_sigma_value));
      for (double log_sigma : knobs.log_sigma) result.push_back(given_sigma(log_sigma));
      break;
  }
  return result;
}

}  // namespace

Outputs elbo_finalize(const Stats& stats, int64_t data_dims, int64_t latent_dims, const Knobs& knobs) {
  const int64_t batch = static_cast<int64_t>(stats.s.size());
  const double dims = static_cast<double>(data_dims);
  const auto sigma = sigmas(stats, dims, knobs);

  std::vector<double> distortions(batch), losses(batch);
  for (int64_t i = 0; i < batch; ++i) {
    distortions[i] =
        sigma.empty() ? distortion(stats.s[i], dims) : distortion(stats.s[i], dims, sigma[sigma.size() == 1 ? 0 : i]);
    losses[i] = distortions[i] + at(knobs.beta, i, knobs.beta_value) * stats.kl_clamped[i];
  }

  Outputs out;
  for (const Sigma& one : sigma) out.sigma.push_back(std::exp(one.log_sigma));
  if (knobs.reduction == kNone) {
    out.loss = losses;
    out.distortion = distortions;
    out.rate = stats.kl;
    return out;
  }
  const double r = reduction_weight(knobs.reduction, batch, data_dims ? data_dims : latent_dims);
  out.distortion = {r * sum(distortions)};
  out.rate = {r * sum(stats.kl)};
  if (knobs.capacity) {
    const double gap = std::abs(capacity_gap(stats, knobs));
    out.loss = {out.distortion[0] + r * batch * at(knobs.beta, 0, knobs.beta_value) * gap};
  } else {
    out.loss = {r * sum(losses)};
  }
  return out;
}

Weights elbo_weights(
    const Stats& stats, int64_t data_dims, int64_t latent_dims, const Knobs& knobs, const GradOutputs& grad_outputs) {
  const int64_t batch = static_cast<int64_t>(stats.s.size());
  const double dims = static_cast<double>(data_dims);
  const double r = reduction_weight(knobs.reduction, batch, data_dims ? data_dims : latent_dims);
  const auto sigma = sigmas(stats, dims, knobs);

  Weights out;
  out.error.resize(batch);
  out.through_loss.resize(batch);
  out.through_rate.resize(batch);
  out.log_sigma.assign(knobs.sigma_mode == kGiven ? knobs.log_sigma.size() : 0, 0.0);
  out.beta.assign(knobs.beta.size(), 0.0);

  const double gap = knobs.capacity ? capacity_gap(stats, knobs) : 0;
  double slope_sum = 0;  // Σ_j w_j (D − S_j/σ²): how the loss changes with a log σ that the batch shares
  for (int64_t i = 0; i < batch; ++i) {
    const Weight weight = {
        r * at(grad_outputs.loss, i, 0), r * at(grad_outputs.distortion, i, 0), r * at(grad_outputs.rate, i, 0)};
    const Sigma own = sigma.empty() ? Sigma{} : sigma[sigma.size() == 1 ? 0 : i];
    const double b = at(knobs.beta, i, knobs.beta_value);
    Factors f = factors(knobs.sigma_mode, own, stats.s[i], stats.kl_clamped[i], dims, b, weight);
    if (knobs.capacity) limit_by_capacity(f, weight, gap);
    out.error[i] = f.error;
    out.through_loss[i] = f.through_loss;
    out.through_rate[i] = f.through_rate;
    if (!out.log_sigma.empty()) out.log_sigma[out.log_sigma.size() == 1 ? 0 : i] += f.log_sigma;
    if (!out.beta.empty()) out.beta[out.beta.size() == 1 ? 0 : i] += f.beta;
    slope_sum += f.log_sigma;
  }
  if (knobs.sigma_mode == kBatch) {
    const double through = through_shared_sigma(sigma[0], slope_sum, sum(stats.s));
    for (double& a : out.error) a += through;
  }
  return out;
}

double own_error_weight(
    int64_t sample, double s, int64_t batch, int64_t data_dims, const Knobs& knobs, double grad_scale) {
  const double dims = static_cast<double>(data_dims);
  const double w = reduction_weight(knobs.reduction, batch, dims) * grad_scale;
  const Sigma sigma = knobs.sigma_mode == kImage ? optimal_sigma(s, dims, knobs.min_log_sigma, knobs.softclip)
                                                 : given_sigma(at(knobs.log_sigma, sample, knobs.log_sigma_value));
  return factors(knobs.sigma_mode, sigma, s, 0, dims, 0, {w, 0, 0}).error;
}

}  // namespace elbo
