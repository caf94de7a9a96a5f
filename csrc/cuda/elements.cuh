// The data and the latents as the element loops see them: what is read of an element, and how wide.
#pragma once

#include "device.cuh"

namespace elbo {

constexpr int kLatentVector = 4;  // elements: 128 bits of float, 64 of a half dtype

__device__ inline int64_t offset_of(const Inside& inside, uint32_t element) {
  int64_t offset = 0;
#pragma unroll 1
  for (int l = 0; l < inside.levels; ++l) {
    const Inside::Level& level = inside.level[l];
    offset += static_cast<int64_t>(element / level.divisor % level.size) * level.stride;
  }
  return offset;
}

template <class A, class R, class T, bool Element>
struct DataPiece {
  static constexpr int V = 16 / sizeof(R);
  static constexpr int Turns = Element && V > 4 ? 1 : 2;  // of 128 bits of each tensor; more would cost registers
  const R* recon;
  const T* target;
  const Inside* inside;
  const char* log_sigma;  // of the piece where it lies as the data do, else of the sample
  uint32_t first;

  __device__ DataPiece(const Data& data, int64_t sample, int64_t first)
      : recon(reinterpret_cast<const R*>(data.recon.at(sample, first))),
        target(reinterpret_cast<const T*>(data.target.at(sample, first))),
        inside(&data.log_sigma),
        log_sigma(Element ? data.log_sigma.values.at(sample, data.log_sigma.levels ? 0 : first) : nullptr),
        first(static_cast<uint32_t>(first)) {}

  template <class... Written>
  __device__ int head(int n, const Written*... written) const {
    if (Element && inside->levels == 0) {
      return head_of(n, recon, target, reinterpret_cast<const T*>(log_sigma), written...);
    }
    return head_of(n, recon, target, written...);
  }

  template <int N>
  struct Fetched {
    Few<R, N> r;
    Few<T, N> t;
    Values<A, Element ? N : 1> log_sigma;

    __device__ A error(int j) const {
      return static_cast<A>(r.value[j]) - static_cast<A>(t.value[j]);
    }
  };

  template <int N>
  __device__ Fetched<N> load(int i, Count<N> count) const {
    Fetched<N> f;
    f.r = elbo::load(recon + i, count);
    f.t = elbo::load(target + i, count);
    if constexpr (Element) {
      if (inside->levels == 0) {
        const auto few = elbo::load(reinterpret_cast<const T*>(log_sigma) + i, count);
#pragma unroll
        for (int j = 0; j < N; ++j) f.log_sigma.value[j] = static_cast<A>(few.value[j]);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
          f.log_sigma.value[j] = reinterpret_cast<const A*>(log_sigma)[offset_of(*inside, first + i + j)];
      }
    }
    return f;
  }
};

template <class A>
struct LatentPiece {
  static constexpr int V = kLatentVector;
  const Latents& latents;
  const char *mu, *logvar, *prior_mu, *prior_logvar;

  __device__ LatentPiece(const Latents& latents, int64_t sample, int64_t first)
      : latents(latents), mu(latents.mu.at(sample, first)), logvar(latents.logvar.at(sample, first)) {
    prior_mu = latents.has_prior ? latents.prior_mu.at(sample, first) : nullptr;
    prior_logvar = latents.has_prior ? latents.prior_logvar.at(sample, first) : nullptr;
  }

  // Vectors from the start or not at all: latents are small.
  __device__ int head(int n) const {
    const Latents& l = latents;
    const bool wide = vectors(l.mu, mu) && vectors(l.logvar, logvar) && vectors(l.prior_mu, prior_mu) &&
                      vectors(l.prior_logvar, prior_logvar);
    return wide ? 0 : n;
  }

  static __device__ bool vectors(const Span& span, const char* p) {
    return aligned(p, V * span.itemsize < 16 ? V * span.itemsize : 16);
  }

  template <int N>
  struct Fetched {
    Values<A, N> mu, logvar, prior_mu, prior_logvar;
  };

  template <int N>
  __device__ Fetched<N> load(int i, Count<N> count) const {
    Fetched<N> f;
    f.mu = load_any<A>(latents.mu, mu, i, count);
    f.logvar = load_any<A>(latents.logvar, logvar, i, count);
    if (latents.has_prior) {
      f.prior_mu = load_any<A>(latents.prior_mu, prior_mu, i, count);
      f.prior_logvar = load_any<A>(latents.prior_logvar, prior_logvar, i, count);
    }
    return f;
  }

  template <int N>
  __device__ A nats(const Fetched<N>& f, int j) const {
    const A m = f.mu.value[j], l = f.logvar.value[j];
    return latents.has_prior ? kl<A>(m, l, f.prior_mu.value[j], f.prior_logvar.value[j]) : kl<A>(m, l);
  }
};

}  // namespace elbo
