// Stage two, O(B) and in double: S and KL to loss, distortion, rate and σ; and the prologue of the gradients, which
// turns the same numbers into one factor per sample.
#include <numeric>

#include "elbo.h"

namespace elbo {
namespace {

double sum(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

double gap_of(const Stats& stats, const Options& options) {
  return options.has_capacity
             ? capacity_gap(options, sum(stats.kl_clamped), static_cast<double>(stats.kl_clamped.size()))
             : 0;
}

// The σ of each sample, computed once where all have the same.
class Sigmas {
 public:
  Sigmas(const Stats& stats, const Batch& batch, const Options& options) {
    const bool given_once = options.sigma_mode == kGiven && options.log_sigma.tensor.batch_stride == 0;
    shared_ = given_once || options.sigma_mode == kBatch || options.sigma_mode == kElement;
    const double size = static_cast<double>(batch.size), dims = static_cast<double>(batch.data.dims);
    const double total = sum(stats.s);
    values_.resize(shared_ ? 1 : batch.size);
    for (size_t i = 0; i < values_.size(); ++i) values_[i] = sigma_of(options, i, stats.s[i], total, size, dims);
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

}  // namespace

template <class A>
void elbo_finalize(const Stats& stats, const Batch& batch, const Options& options, const Outputs& outputs) {
  const double size = static_cast<double>(batch.size), dims = static_cast<double>(batch.data.dims);
  const Sigmas sigmas(stats, batch, options);
  A *loss = static_cast<A*>(outputs.loss), *nats = static_cast<A*>(outputs.distortion);
  A *rate = static_cast<A*>(outputs.rate), *sigma = static_cast<A*>(outputs.sigma);
  const bool each = options.reduction == kNone, inside = options.sigma_mode == kElement;
  double distortions = 0, losses = 0;
  for (int64_t i = 0; i < batch.size; ++i) {
    const double d = inside ? distortion(stats.s[i], dims) : distortion(stats.s[i], dims, sigmas[i]);
    const double l = d + at(options.beta, i) * stats.kl_clamped[i];
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
  const double weight = reduction_weight(options, batch), mean_distortion = weight * distortions;
  const double mean_loss =
      options.has_capacity
          ? mean_distortion + capacity_penalty(weight, size, at(options.beta, 0), gap_of(stats, options))
          : weight * losses;
  *loss = static_cast<A>(mean_loss);
  *nats = static_cast<A>(mean_distortion);
  *rate = static_cast<A>(weight * sum(stats.kl));
}

std::vector<Factors> elbo_factors(
    const Stats& stats, const Batch& batch, const Options& options, const GradOutputs& grad_outputs,
    const Gradients& gradients) {
  const double dims = static_cast<double>(batch.data.dims), scale = reduction_weight(options, batch);
  const double gap = gap_of(stats, options);
  const Sigmas sigmas(stats, batch, options);
  std::vector<Factors> result(batch.size);
  double slope_sum = 0;  // Σ_j w_j (D − S_j/σ²): how the loss changes with a log σ that the batch shares
  double beta_sum = 0;
  for (int64_t i = 0; i < batch.size; ++i) {
    const Weight weight = weight_of(scale, grad_outputs, i);
    result[i] = factors_of(options, sigmas[i], i, stats.s[i], stats.kl_clamped[i], dims, gap, weight);
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
    const double term = shared_sigma_term(sigmas[0], slope_sum, sum(stats.s));
    for (Factors& f : result) f.recon_scale += term;
  }
  return result;
}

double own_recon_scale(int64_t sample, double s, const Batch& batch, const Options& options, double grad_scale) {
  const double size = static_cast<double>(batch.size), dims = static_cast<double>(batch.data.dims);
  const Sigma sigma = sigma_of(options, sample, s, 0, size, dims);
  const Weight weight = {reduction_weight(options, batch) * grad_scale, 0, 0};
  return factors(options.sigma_mode, sigma, s, 0, dims, 0, weight).recon_scale;
}

template void elbo_finalize<float>(const Stats&, const Batch&, const Options&, const Outputs&);
template void elbo_finalize<double>(const Stats&, const Batch&, const Options&, const Outputs&);

}  // namespace elbo
