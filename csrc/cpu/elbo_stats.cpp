// Stage one: S_i = Σ_d e² (or Σ_d [e²/σ_d² + 2 log σ_d]) and KL_i, in one pass over the data.
#include "blocks.h"
#include "elbo.h"
#include "latents.h"
#include "tasks.h"

namespace elbo {
namespace {

template <class A>
double scaled_chunk_sum(const Data& data, int64_t sample, int64_t chunk) {
  double sum = 0;
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    A scratch[3][kBlock];
    const A* r = read(data.recon, sample, first, n, scratch[0]);
    const A* t = read(data.target, sample, first, n, scratch[1]);
    const A* ls = read_log_sigma(data.log_sigma, sample, first, n, scratch[2]);
    sum += sum_lanes<A>(n, [&](int64_t i, auto lanes) {
      return scaled_error<Vector<A>>(difference(load(r + i, lanes), load(t + i, lanes)), load(ls + i, lanes));
    });
  });
  return sum;
}

}  // namespace

template <class A>
Stats elbo_stats(const Batch& batch) {
  const Data& data = batch.data;
  const Latents& latents = batch.latents;
  const int64_t data_chunks = chunks(data.dims), latent_chunks = chunks(latents.dims);
  std::vector<double> s(batch.size * data_chunks), rate(batch.size * latent_chunks), clamped(rate.size());
  const auto data_task = [&](int64_t sample, int64_t chunk) {
    s[sample * data_chunks + chunk] =
        data.has_log_sigma ? scaled_chunk_sum<A>(data, sample, chunk) : chunk_sum<A>(data, sample, chunk);
  };
  const auto latent_task = [&](int64_t sample, int64_t chunk) {
    const int64_t task = sample * latent_chunks + chunk;
    (latents.has_prior ? rates<A, true> : rates<A, false>)(latents, sample, chunk, rate[task], clamped[task]);
  };
  for_shares(batch.size, data.dims, latents.dims, each(data.dims, data_task), each(latents.dims, latent_task));
  return {sums_of(batch.size, s), sums_of(batch.size, rate), sums_of(batch.size, clamped)};
}

template Stats elbo_stats<float>(const Batch&);
template Stats elbo_stats<double>(const Batch&);

}  // namespace elbo
