// Stage one: A_i = Σ_d |e|^q (or Σ_d [|e|^q/σ_d^q + q log σ_d]) and KL_i, in one pass over the data.
#include "blocks.h"
#include "elbo.h"
#include "latents.h"
#include "tasks.h"

namespace elbo {
namespace {

template <class A, int Q>
BlockSums data_sums(const Data& data, int64_t sample, int64_t chunk) {
  if (has_elements(data)) return element_sums<A, Q>(data, sample, chunk);
  return {chunk_sum<A, Q>(data, sample, chunk), 0};
}

}  // namespace

std::vector<double> with_extra_error(std::vector<double> a, const Number& extra_error) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += at(extra_error, static_cast<int64_t>(i));
  return a;
}

template <class A>
Stats elbo_stats(const Batch& batch, const Number& extra_error) {
  const Data& data = batch.data;
  const Latents& latents = batch.latents;
  const int64_t data_chunks = chunks(data.dims), latent_chunks = chunks(latents.dims);
  std::vector<double> a(batch.size * data_chunks), weights(data.has_weight ? a.size() : 0);
  std::vector<double> rate(batch.size * latent_chunks), clamped(rate.size());
  const auto data_task = [&](int64_t sample, int64_t chunk) {
    const int64_t task = sample * data_chunks + chunk;
    const BlockSums sums = (data.exponent == 2 ? data_sums<A, 2> : data_sums<A, 1>)(data, sample, chunk);
    a[task] = sums.a;
    if (data.has_weight) weights[task] = sums.weights;
  };
  const auto latent_task = [&](int64_t sample, int64_t chunk) {
    const int64_t task = sample * latent_chunks + chunk;
    rates_of<A>(latents)(latents, sample, chunk, rate[task], clamped[task]);
  };
  for_shares(batch.size, data.dims, latents.dims, each(data.dims, data_task), each(latents.dims, latent_task));
  Stats stats = {
      with_extra_error(sums_of(batch.size, a), extra_error),
      sums_of(batch.size, rate),
      sums_of(batch.size, clamped),
      {}};
  if (data.has_weight) stats.weights = sums_of(batch.size, weights);
  return stats;
}

template Stats elbo_stats<float>(const Batch&, const Number&);
template Stats elbo_stats<double>(const Batch&, const Number&);

}  // namespace elbo
