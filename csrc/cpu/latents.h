// What is done to a chunk of latents: beside the data, and for a hierarchy's levels alone.
#pragma once

#include <algorithm>

#include "elbo.h"
#include "results.h"
#include "tasks.h"

namespace elbo {

// Σ KL and Σ max(KL, free_bits)
template <class A, bool Prior>
inline void rates(const Latents& latents, int64_t sample, int64_t chunk, double& rate, double& clamped) {
  const A free_bits = static_cast<A>(latents.free_bits.value_or(0));
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
    if (!latents.free_bits) {
      clamped += sum;
    } else {  // the block is in the cache, and free bits are rare: a second pass keeps the first one simple
      clamped += sum_lanes<A>(n, [&](int64_t i, auto lanes) {
        const Vector<A> v = element(i, lanes);
        return v < free_bits ? Vector<A>{} + free_bits : v;  // NaN passes
      });
    }
  });
}

template <class A, bool Prior>
inline void latent_gradient(
    const Latents& latents, A through_loss, A through_rate, int64_t sample, int64_t chunk, const Gradients& out) {
  const A free_bits = static_cast<A>(latents.free_bits.value_or(0));
  constexpr int kCount = Prior ? 4 : 2;
  const Span* const all[] = {&out.mu, &out.logvar, &out.prior_mu, &out.prior_logvar};
  const Span* wanted[kCount];
  std::copy_n(all, kCount, wanted);
  for_blocks(chunk, latents.dims, [&](int64_t first, int64_t n) {
    A scratch[4][kBlock];
    const A* mu = read(latents.mu, sample, first, n, scratch[0]);
    const A* logvar = read(latents.logvar, sample, first, n, scratch[1]);
    const A* prior_mu = Prior ? read(latents.prior_mu, sample, first, n, scratch[2]) : nullptr;
    const A* prior_logvar = Prior ? read(latents.prior_logvar, sample, first, n, scratch[3]) : nullptr;
    BlockResults<A, kCount> results(wanted, sample, first, out.latents_past_caches);
    for_lanes<A>(n, [&](int64_t i, auto lanes) {
      using V = Vector<A>;
      const V m = load(mu + i, lanes), l = load(logvar + i, lanes);
      V m_p{}, l_p{};
      if constexpr (Prior) {
        m_p = load(prior_mu + i, lanes);
        l_p = load(prior_logvar + i, lanes);
      }
      V b = V{} + (through_loss + through_rate);
      if (latents.free_bits) {
        const V nats = Prior ? kl<V>(m, l, m_p, l_p) : kl<V>(m, l);
        b = through_rate + (nats >= free_bits ? V{} + through_loss : V{});
      }
      const KlGrad<V> d = Prior ? kl_grad<V>(b, m, l, m_p, l_p) : kl_grad<V>(b, m, l);
      results.put(0, i, d.mu, lanes);
      results.put(1, i, d.logvar, lanes);
      if constexpr (Prior) {
        results.put(2, i, d.prior_mu, lanes);
        results.put(3, i, d.prior_logvar, lanes);
      }
    });
    results.finish(n);
  });
}

}  // namespace elbo
