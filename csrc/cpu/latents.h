// What is done to a chunk of latents: beside the data, and for a hierarchy's levels alone.
#pragma once

#include <type_traits>

#include "elbo.h"
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

// Whether the first `count` of g are results, not scratch, and begin where `stream` may.
template <class A>
ELBO_INLINE bool each_is_direct(A* const* g, A (*scratch)[kBlock], int count) {
  for (int k = 0; k < count; ++k) {
    if (g[k] == scratch[k] || reinterpret_cast<uintptr_t>(g[k]) % kVectorBytes != 0) return false;
  }
  return true;
}

template <class A, bool Prior>
inline void latent_gradient(
    const Latents& latents, A through_loss, A through_rate, int64_t sample, int64_t chunk, const Gradients& out) {
  const A free_bits = static_cast<A>(latents.free_bits.value_or(0));
  const Span* wanted[] = {&out.mu, &out.logvar, &out.prior_mu, &out.prior_logvar};
  for_blocks(chunk, latents.dims, [&](int64_t first, int64_t n) {
    A scratch[8][kBlock];
    const A* mu = read(latents.mu, sample, first, n, scratch[0]);
    const A* logvar = read(latents.logvar, sample, first, n, scratch[1]);
    const A* prior_mu = Prior ? read(latents.prior_mu, sample, first, n, scratch[2]) : nullptr;
    const A* prior_logvar = Prior ? read(latents.prior_logvar, sample, first, n, scratch[3]) : nullptr;
    A* g[4];
    for (int k = 0; k < 4; ++k) {
      g[k] = wanted[k]->base ? write_to(*wanted[k], sample, first, scratch[4 + k]) : scratch[4 + k];
    }
    const auto run = [&](auto past_caches) {
      const auto put = [&](int k, int64_t i, Vector<A> v, auto lanes) {
        if constexpr (past_caches && std::is_same_v<decltype(lanes), AllLanes<A>>) {
          stream(g[k] + i, v);
        } else {
          store(g[k] + i, v, lanes);
        }
      };
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
        put(0, i, d.mu, lanes);
        put(1, i, d.logvar, lanes);
        if constexpr (Prior) {
          put(2, i, d.prior_mu, lanes);
          put(3, i, d.prior_logvar, lanes);
        }
      });
    };
    if (out.latents_past_caches && each_is_direct(g, scratch + 4, Prior ? 4 : 2)) {
      run(std::true_type{});
      streamed();
    } else {
      run(std::false_type{});
    }
    for (int k = 0; k < 4; ++k) {
      if (wanted[k]->base) written(*wanted[k], sample, first, n, scratch[4 + k]);
    }
  });
}

}  // namespace elbo
