// Stage one: S_i = Σ_d e² (or Σ_d [e²/σ_d² + 2 log σ_d]) and KL_i, in one pass over the data.
#include "blocks.h"
#include "elbo.h"
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
    const A* ls = read_log_sigma(*data.log_sigma, sample, first, n, scratch[2]);
    sum += sum_lanes<A>(n, [&](int64_t i, auto lanes) {
      return scaled_error<Vector<A>>(load(r + i, lanes) - load(t + i, lanes), load(ls + i, lanes));
    });
  });
  return sum;
}

template <class A, bool Prior>
void rates(const Latents& latents, int64_t sample, int64_t chunk, double& rate, double& clamped) {
  const A free_bits = static_cast<A>(latents.free_bits);
  rate = clamped = 0;
  for_blocks(chunk, latents.dims, [&](int64_t first, int64_t n) {
    A scratch[4][kBlock];
    const A* mu = read(latents.mu, sample, first, n, scratch[0]);
    const A* logvar = read(latents.logvar, sample, first, n, scratch[1]);
    const A* prior_mu = Prior ? read(latents.prior_mu, sample, first, n, scratch[2]) : nullptr;
    const A* prior_logvar = Prior ? read(latents.prior_logvar, sample, first, n, scratch[3]) : nullptr;
    const auto element = [&](int64_t i, auto lanes) {
      if constexpr (Prior) {
        return kl<Vector<A>>(
            load(mu + i, lanes), load(logvar + i, lanes), load(prior_mu + i, lanes), load(prior_logvar + i, lanes));
      } else {
        return kl<Vector<A>>(load(mu + i, lanes), load(logvar + i, lanes));
      }
    };
    const double sum = sum_lanes<A>(n, element);
    rate += sum;
    if (free_bits == 0) {
      clamped += sum;
    } else {  // the block is in the cache, and free bits are rare: a second pass keeps the first one simple
      clamped += sum_lanes<A>(n, [&](int64_t i, auto lanes) {
        const Vector<A> v = element(i, lanes);
        return v < free_bits ? Vector<A>{} + free_bits : v;  // NaN passes
      });
    }
  });
}

}  // namespace

template <class A>
Stats elbo_stats(int64_t batch, const Data& data, const Latents& latents) {
  const int64_t data_chunks = chunks(data.dims), latent_chunks = chunks(latents.dims);
  std::vector<double> s(batch * data_chunks), rate(batch * latent_chunks), clamped(batch * latent_chunks);
  const auto data_task = [&](int64_t sample, int64_t chunk) {
    s[sample * data_chunks + chunk] =
        data.log_sigma ? scaled_chunk_sum<A>(data, sample, chunk) : chunk_sum<A>(data, sample, chunk);
  };
  const auto latent_task = [&](int64_t sample, int64_t chunk) {
    const int64_t task = sample * latent_chunks + chunk;
    (latents.has_prior ? rates<A, true> : rates<A, false>)(latents, sample, chunk, rate[task], clamped[task]);
  };
  for_shares(batch, data.dims, latents.dims, each(data.dims, data_task), each(latents.dims, latent_task));
  return {sums_of(batch, s), sums_of(batch, rate), sums_of(batch, clamped)};
}

template Stats elbo_stats<float>(int64_t, const Data&, const Latents&);
template Stats elbo_stats<double>(int64_t, const Data&, const Latents&);

}  // namespace elbo
