// What is done to a chunk of latents: beside the data, and for a hierarchy's levels alone.
#pragma once

#include "elbo.h"
#include "results.h"
#include "tasks.h"

namespace elbo {

// n elements of a sample, of at most kBlock; without a prior its pointers are null. Range: logvar is clamped.
template <class A, bool Prior, bool Range>
struct LatentBlock {
  const A *mu, *logvar, *prior_mu, *prior_logvar;
  A least, most;

  LatentBlock(const Latents& latents, int64_t sample, int64_t first, int64_t n, A (&scratch)[4][kBlock])
      : mu(read(latents.mu, sample, first, n, scratch[0])),
        logvar(read(latents.logvar, sample, first, n, scratch[1])),
        prior_mu(Prior ? read(latents.prior_mu, sample, first, n, scratch[2]) : nullptr),
        prior_logvar(Prior ? read(latents.prior_logvar, sample, first, n, scratch[3]) : nullptr),
        least(static_cast<A>(latents.logvar_min)),
        most(static_cast<A>(latents.logvar_max)) {}

  template <class N>
  ELBO_INLINE auto logvar_at(int64_t i, N lanes) const {
    const auto l = load(logvar + i, lanes);
    if constexpr (Range) {
      return clamped(l, least, most);
    } else {
      return l;
    }
  }

  template <class N>
  ELBO_INLINE auto nats(int64_t i, N lanes) const {
    const auto m = load(mu + i, lanes), l = logvar_at(i, lanes);
    if constexpr (Prior) {
      return kl(m, l, load(prior_mu + i, lanes), load(prior_logvar + i, lanes));
    } else {
      return kl(m, l);
    }
  }

  template <class V, class N>
  ELBO_INLINE KlGrad<V> gradient(V b, int64_t i, N lanes) const {
    const auto m = load(mu + i, lanes), l = logvar_at(i, lanes);
    KlGrad<V> g;
    if constexpr (Prior) {
      g = kl_grad<V>(b, m, l, load(prior_mu + i, lanes), load(prior_logvar + i, lanes));
    } else {
      g = kl_grad<V>(b, m, l);
    }
    if constexpr (Range) g.logvar = clamped_grad(g.logvar, load(logvar + i, lanes), least, most);
    return g;
  }
};

// Σ KL and Σ max(KL, free_bits)
template <class A, bool Prior, bool Range>
inline void rates(const Latents& latents, int64_t sample, int64_t chunk, double& rate, double& clamped) {
  rate = clamped = 0;
  for_blocks(chunk, latents.dims, [&](int64_t first, int64_t n) {
    A scratch[4][kBlock];
    const LatentBlock<A, Prior, Range> block(latents, sample, first, n, scratch);
    const double sum = sum_lanes<A, kAbreast<A>>(n, [&](int64_t i, auto lanes) { return block.nats(i, lanes); });
    rate += sum;
    if (!latents.has_free_bits) {
      clamped += sum;
    } else {  // the block is in the cache, and free bits are rare: a second pass keeps the first one simple
      const A free_bits = static_cast<A>(latents.free_bits);
      clamped += sum_lanes<A, kAbreast<A>>(n, [&](int64_t i, auto lanes) {
        const auto v = block.nats(i, lanes);
        return select(v < free_bits, repeated(Vector<A>{} + free_bits, lanes), v);  // NaN passes
      });
    }
  });
}

template <class A>
auto rates_of(const Latents& latents) {
  if (latents.has_range) return latents.has_prior ? rates<A, true, true> : rates<A, false, true>;
  return latents.has_prior ? rates<A, true, false> : rates<A, false, false>;
}

template <class A, bool Prior, bool Range>
inline void latent_gradient(
    const Latents& latents, A grad_kl_clamped, A grad_kl, int64_t sample, int64_t chunk, const Gradients& out) {
  const Span* const wanted[] = {&out.mu, &out.logvar, &out.prior_mu, &out.prior_logvar};
  for_blocks(chunk, latents.dims, [&](int64_t first, int64_t n) {
    using V = Vector<A>;
    A scratch[4][kBlock], results[4][kBlock], factors[kBlock];
    const LatentBlock<A, Prior, Range> block(latents, sample, first, n, scratch);
    const bool differ = latents.has_free_bits;  // the elements' factors
    const V factor = V{} + (grad_kl_clamped + grad_kl);
    if (differ) {  // a pass of its own, as above
      const A free_bits = static_cast<A>(latents.free_bits);
      for_lanes<A, kAbreast<A>>(n, [&](int64_t i, auto lanes) {
        const auto none = repeated(V{}, lanes);
        store(factors + i, grad_kl + select(block.nats(i, lanes) >= free_bits, none + grad_kl_clamped, none), lanes);
      });
    }
    write_block<kAbreast<A>>(
        wanted, results, sample, first, n, out.latents_past_caches, [&](int64_t i, auto lanes, auto places) {
          const auto b = differ ? load(factors + i, lanes) : repeated(factor, lanes);
          const auto d = block.gradient(b, i, lanes);
          places.put(0, i, d.mu, lanes);
          places.put(1, i, d.logvar, lanes);
          if constexpr (Prior) {
            places.put(2, i, d.prior_mu, lanes);
            places.put(3, i, d.prior_logvar, lanes);
          }
        });
  });
}

template <class A>
auto latent_gradient_of(const Latents& latents) {
  if (latents.has_range) return latents.has_prior ? latent_gradient<A, true, true> : latent_gradient<A, false, true>;
  return latents.has_prior ? latent_gradient<A, true, false> : latent_gradient<A, false, false>;
}

}  // namespace elbo
