// Stage two, O(B) and in double: A and KL to loss, distortion, rate and σ; and the prologue of the gradients, which
// turns the same numbers into one factor per sample.
#include <numeric>

#include "elbo.h"

namespace elbo {
namespace {

double sum(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

// Of the samples' rates, which a limit per batch is held against.
double mean_rate(const Stats& stats, const Options& options) {
  return limits_batch(options.limit_mode) ? sum(stats.kl_clamped) / static_cast<double>(stats.kl_clamped.size()) : 0;
}

// How many elements a sample has, or the sum of their weights.
double dims_of(const Stats& stats, const Batch& batch, int64_t i) {
  return batch.data.has_weight ? stats.weights[i] : static_cast<double>(batch.data.dims);
}

double elements_of(const Stats& stats, const Batch& batch) {
  return batch.data.has_weight ? sum(stats.weights)
                               : static_cast<double>(batch.size) * static_cast<double>(batch.data.dims);
}

double weight_of_samples(const Stats& stats, const Batch& batch, const Options& options) {
  return reduction_weight(options, batch, sum(stats.weights));
}

// The σ of each sample, computed once where all have the same.
class Sigmas {
 public:
  Sigmas(const Stats& stats, const Batch& batch, const Options& options) {
    const bool given_once = options.sigma_mode == kGiven && options.log_sigma.tensor.batch_stride == 0;
    shared_ = given_once || options.sigma_mode == kBatch || options.sigma_mode == kElement;
    const double total = sum(stats.a), elements = elements_of(stats, batch);
    values_.resize(shared_ ? 1 : batch.size);
    for (size_t i = 0; i < values_.size(); ++i) {
      values_[i] = sigma_of(options, i, stats.a[i], total, elements, dims_of(stats, batch, i));
    }
  }

  const Sigma& operator[](int64_t i) const {
    return values_[shared_ ? 0 : i];
  }

 private:
  std::vector<Sigma> values_;
  bool shared_;
};

void put(const Span& to, int64_t i, double value) {
  Span own = to;
  own.base = to.at(i, 0);
  convert_to(own, &value, 1);
}

// ∂L/∂A_i, or their sum where all samples have the same extra error.
void put_extra_error(const std::vector<Factors>& factors, const Options& options, const Gradients& gradients) {
  double total = 0;
  for (size_t i = 0; i < factors.size(); ++i) {
    const double own = factors[i].recon_scale / options.q;
    total += own;
    if (gradients.extra_error_each) put(gradients.extra_error, static_cast<int64_t>(i), own);
  }
  if (!gradients.extra_error_each) put(gradients.extra_error, 0, total);
}

}  // namespace

template <class A>
void elbo_finalize(const Stats& stats, const Batch& batch, const Options& options, const Outputs& outputs) {
  const Sigmas sigmas(stats, batch, options);
  A *loss = static_cast<A*>(outputs.loss), *nats = static_cast<A*>(outputs.distortion);
  A *rate = static_cast<A*>(outputs.rate), *sigma = static_cast<A*>(outputs.sigma);
  const bool each = options.reduction == kNone, inside = options.sigma_mode == kElement;
  double distortions = 0, losses = 0;
  for (int64_t i = 0; i < batch.size; ++i) {
    const double d = distortion_of(options, stats.a[i], dims_of(stats, batch, i), sigmas[i]);
    const double l = d + at(options.beta, i) * limited_rate(options, stats.kl_clamped[i]);
    if (!inside && (outputs.sigma_each || i == 0)) sigma[i] = static_cast<A>(::exp(sigmas[i].log_sigma));
    if (each) {
      loss[i] = static_cast<A>(l);
      nats[i] = static_cast<A>(d);
      rate[i] = static_cast<A>(stats.kl[i]);
    }
    distortions += d;
    losses += l;
  }
  if (each) return;
  const double weight = weight_of_samples(stats, batch, options), mean_distortion = weight * distortions;
  const double mean_loss =
      limits_batch(options.limit_mode)
          ? mean_distortion +
                weight * limited_batch(options, static_cast<double>(batch.size), mean_rate(stats, options))
          : weight * losses;
  *loss = static_cast<A>(mean_loss);
  *nats = static_cast<A>(mean_distortion);
  *rate = static_cast<A>(weight * sum(stats.kl));
}

std::vector<Factors> elbo_factors(
    const Stats& stats, const Batch& batch, const Options& options, const GradOutputs& grad_outputs,
    const Gradients& gradients) {
  const double scale = weight_of_samples(stats, batch, options), mean = mean_rate(stats, options);
  const Sigmas sigmas(stats, batch, options);
  std::vector<Factors> result(batch.size);
  double slope_sum = 0;  // Σ_j w_j (D − A_j/σ^q): how the loss changes with a log σ that the batch shares
  double beta_sum = 0;
  for (int64_t i = 0; i < batch.size; ++i) {
    const Weight weight = weight_of(scale, grad_outputs, i);
    result[i] =
        factors_of(options, sigmas[i], i, stats.a[i], stats.kl_clamped[i], dims_of(stats, batch, i), mean, weight);
    slope_sum += result[i].log_sigma;
    beta_sum += result[i].beta;
    if (options.sigma_mode == kGiven && gradients.log_sigma_each) put(gradients.log_sigma, i, result[i].log_sigma);
    if (gradients.beta_each) put(gradients.beta, i, result[i].beta);
  }
  if (options.sigma_mode == kGiven && gradients.log_sigma.base && !gradients.log_sigma_each) {
    put(gradients.log_sigma, 0, slope_sum);
  }
  if (gradients.beta.base && !gradients.beta_each) put(gradients.beta, 0, beta_sum);
  if (options.sigma_mode == kBatch) {
    const double term = shared_sigma_term(sigmas[0], slope_sum, sum(stats.a));
    for (Factors& f : result) f.recon_scale += term;
  }
  if (gradients.extra_error.base) put_extra_error(result, options, gradients);
  return result;
}

double own_recon_scale(int64_t sample, double a, const Batch& batch, const Options& options, double grad_scale) {
  const double dims = static_cast<double>(batch.data.dims);
  const Sigma sigma = sigma_of(options, sample, a, 0, 0, dims);
  const Weight weight = {reduction_weight(options, batch) * grad_scale, 0, 0};
  return factors(options.sigma_mode, sigma, a, 0, dims, 0, weight).recon_scale;
}

template void elbo_finalize<float>(const Stats&, const Batch&, const Options&, const Outputs&);
template void elbo_finalize<double>(const Stats&, const Batch&, const Options&, const Outputs&);

}  // namespace elbo
