// The data and the latents as the element loops see them: what is read of an element, and how wide.
#pragma once

#include "device.cuh"

namespace elbo {

template <class A, class R, class T, bool Element>
struct DataChunk {
  static constexpr int V = 16 / sizeof(R);
  static constexpr int Turns = Element && V > 4 ? 1 : 2;  // of 128 bits of each tensor; more would cost registers
  const R* recon;
  const T* target;
  const Broadcast* broadcast;
  const char* log_sigma;  // of the chunk where it lies as the data do, else of the sample
  uint32_t first;

  __device__ DataChunk(const Data& data, int64_t sample, int64_t first)
      : recon(reinterpret_cast<const R*>(data.recon.at(sample, first))),
        target(reinterpret_cast<const T*>(data.target.at(sample, first))),
        broadcast(&data.log_sigma),
        log_sigma(Element ? data.log_sigma.values.at(sample, data.log_sigma.rank ? 0 : first) : nullptr),
        first(static_cast<uint32_t>(first)) {}

  template <class... Written>
  __device__ int head(int n, const Written*... written) const {
    if (Element && broadcast->rank == 0) {
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
      return difference(static_cast<A>(r.value[j]), static_cast<A>(t.value[j]));
    }
  };

  template <int N>
  __device__ Fetched<N> load(int i, Count<N> count) const {
    Fetched<N> f;
    f.r = elbo::load(recon + i, count);
    f.t = elbo::load(target + i, count);
    if constexpr (Element) {
      if (broadcast->rank == 0) {
        const auto few = elbo::load(reinterpret_cast<const T*>(log_sigma) + i, count);
#pragma unroll
        for (int j = 0; j < N; ++j) f.log_sigma.value[j] = static_cast<A>(few.value[j]);
      } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
          f.log_sigma.value[j] = reinterpret_cast<const A*>(log_sigma)[offset_of<uint32_t>(*broadcast, first + i + j)];
      }
    }
    return f;
  }
};

// One tensor of the latents', or a gradient of one, from the beginning of a chunk.
struct LatentPart {
  const Span& span;
  char* at;  // null: there is no such tensor

  __device__ LatentPart(const Span& span, const Chunk& p)
      : span(span), at(span.base ? span.at(p.sample, p.first) : nullptr) {}

  // Elements that one access can move, a power of two: 128 bits, or fewer where the address allows no more.
  __device__ int vector() const {
    const unsigned address = static_cast<unsigned>(reinterpret_cast<uintptr_t>(at)) | 16;
    const int bytes = static_cast<int>(address & (0u - address));
    return at == nullptr ? 16 : span.itemsize == 2 ? bytes / 2 : span.itemsize == 4 ? bytes / 4 : bytes / 8;
  }

  __device__ void read(Packed& held, int i, int vector) const {
    if (at) held.read(at + i * span.itemsize, vector * span.itemsize);
  }

  __device__ void write(const Packed& held, int i, int vector) const {
    if (at) held.write(at + i * span.itemsize, vector * span.itemsize);
  }

  template <class A, int N>
  __device__ Values<A, N> take(Packed& held, int i, Count<N> count) const {
    if constexpr (N == 1) {
      return load_any<A>(span, at, i, count);
    } else {
      return held.take<A>(span.dtype);
    }
  }

  template <int N, class F>
  __device__ void put(Packed& held, int i, Count<N> count, F f) const {
    if (at == nullptr) return;
    if constexpr (N == 1) {
      store_any(span, at, i, count, f);
    } else {
      held.put(span.dtype, f);
    }
  }
};

template <class A>
struct LatentChunk {
  const Latents& latents;
  const LatentPart mu, logvar, prior_mu, prior_logvar;

  __device__ LatentChunk(const Latents& latents, const Chunk& p)
      : latents(latents),
        mu(latents.mu, p),
        logvar(latents.logvar, p),
        prior_mu(latents.prior_mu, p),
        prior_logvar(latents.prior_logvar, p) {}

  // 128 bits of the widest dtype, or fewer where an address allows no more.
  __device__ int vector() const {
    return min(min(mu.vector(), logvar.vector()), min(prior_mu.vector(), prior_logvar.vector()));
  }

  struct Held {
    Packed mu, logvar, prior_mu, prior_logvar;
  };

  // One warp over the n elements, `vector` at a time, of which two have a turn, and what is left one by one: turn(held,
  // i, count), and done(held, i) after the turns of those from the i-th on.
  template <class Turn, class Done>
  __device__ void walk(int n, int vector, Turn turn, Done done) const {
    const int groups = vector > 1 ? n / vector : 0;
    for (int g = lane(); g < groups; g += kWarpSize) {
      const int i = g * vector;
      Held held;
      mu.read(held.mu, i, vector);
      logvar.read(held.logvar, i, vector);
      prior_mu.read(held.prior_mu, i, vector);
      prior_logvar.read(held.prior_logvar, i, vector);
#pragma unroll 1
      for (int k = 0; k < vector; k += 2) turn(held, i + k, Count<2>{});
      done(held, i);
    }
    Held nothing;
    for (int i = groups * vector + lane(); i < n; i += kWarpSize) turn(nothing, i, Count<1>{});
  }

  template <int N>
  struct Taken {
    Values<A, N> mu, logvar, prior_mu, prior_logvar;
    Values<A, N> unlimited;  // logvar, where it has a range, as it was given
  };

  template <int N>
  __device__ Taken<N> take(Held& held, int i, Count<N> count) const {
    Taken<N> t;
    t.mu = mu.take<A>(held.mu, i, count);
    t.logvar = t.unlimited = logvar.take<A>(held.logvar, i, count);
    if (latents.has_range) {
      const A least = static_cast<A>(latents.logvar_min), most = static_cast<A>(latents.logvar_max);
#pragma unroll
      for (int j = 0; j < N; ++j) t.logvar.value[j] = clamped(t.logvar.value[j], least, most);
    }
    if (latents.has_prior) {
      t.prior_mu = prior_mu.take<A>(held.prior_mu, i, count);
      t.prior_logvar = prior_logvar.take<A>(held.prior_logvar, i, count);
    }
    return t;
  }

  // The gradient of logvar, from that of what is within its range.
  template <int N>
  __device__ A range_grad(A of_logvar, const Taken<N>& t, int j) const {
    const A least = static_cast<A>(latents.logvar_min), most = static_cast<A>(latents.logvar_max);
    return clamped_grad(of_logvar, t.unlimited.value[j], least, most);
  }

  template <int N>
  __device__ A nats(const Taken<N>& t, int j) const {
    const A m = t.mu.value[j], l = t.logvar.value[j];
    return latents.has_prior ? kl<A>(m, l, t.prior_mu.value[j], t.prior_logvar.value[j]) : kl<A>(m, l);
  }
};

}  // namespace elbo
