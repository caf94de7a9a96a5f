// A pass over elements that are more than two numbers: the sums of a chunk and its gradients, or what one pass keeps.
#pragma once

#include "mixed_elements.cuh"

namespace elbo {

template <class A>
struct MixedSums {
  A a = 0, weights = 0;
};

// The gradients of N elements, in what comes first and last of a chain: recon's is y's where there is an activation.
template <class A, int N>
struct MixedGrads {
  Values<A, N> recon, target, log_sigma;
};

// One warp over `groups` groups of N elements, as walk_groups, but that `use` is there once: the loads of the next
// group are asked for before one is used.
template <int N, class At, class Load, class Use>
__device__ inline void walk_ahead(int groups, Count<N> count, At at, Load load, Use use) {
  decltype(load(0, count)) next = {};
  int g = lane();
  if (g < groups) next = load(at(g), count);
#pragma unroll 1
  while (g < groups) {
    const auto fetched = next;
    const int i = at(g);
    g += kWarpSize;
    if (g < groups) next = load(at(g), count);
    use(i, fetched, count);
  }
}

// Calls f(Count<q>, whether σ is an element's own).
template <bool Own, class F>
__device__ inline void with_likelihood(const Data& data, F f) {
  const auto with_q = [&](auto q) {
    if constexpr (Own) {
      if (data.has_log_sigma) return f(q, std::true_type{});
    }
    f(q, std::false_type{});
  };
  data.exponent == 2 ? with_q(Count<2>{}) : with_q(Count<1>{});
}

// One warp over n elements: the sums, and for each group of elements `take(i, gradients, count)`, a being the sample's
// factor.
template <Order Way = Order::kForward, class A, class R, bool Own, class Take>
__device__ MixedSums<A> mixed_sums(const MixedChunk<A, R, Own>& elements, int n, int head, A a, Take take) {
  constexpr int V = MixedChunk<A, R, Own>::V;
  const Data& data = elements.data;
  const int vectors = (n - head) / V, between = vectors * V;
  MixedSums<A> sums;
  const auto load = [&](int i, auto count) { return elements.load(i, count); };
  const auto use = [&](int i, const auto& fetched, auto count) {
    constexpr int N = count.n;
    MixedGrads<A, N> g;
    Values<A, N> slopes, costs;
    const Values<A, N> x = elements.recon_of(fetched, slopes), t = elements.target_of(fetched);
    with_likelihood<Own>(data, [&](auto q, auto own) {
      constexpr int Q = decltype(q)::n;
      Values<A, N> log_sigma;
      if constexpr (own.value) log_sigma = elements.log_sigma.take(fetched.log_sigma, i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A e = difference(x.value[j], t.value[j]);
        if constexpr (own.value) {
          costs.value[j] = scaled_error<Q>(e, log_sigma.value[j]);
          const DistortionGrad<A> d = distortion_grad<Q>(a, e, log_sigma.value[j]);
          g.target.value[j] = -d.recon;
          g.log_sigma.value[j] = d.log_sigma;
        } else {
          costs.value[j] = power<Q>(e);
          g.target.value[j] = -scaled_slope<Q>(a, e);
          g.log_sigma.value[j] = 0;
        }
        g.recon.value[j] = -g.target.value[j] * slopes.value[j];
      }
    });
    if (data.has_weight) {
      const Values<A, N> weight = elements.weight.take(fetched.weight, i);
      A part = 0;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A m = weight.value[j];
        part += m;
        costs.value[j] = weighted(m, costs.value[j]);
        g.recon.value[j] = weighted(m, g.recon.value[j]);
        g.target.value[j] = weighted(m, g.target.value[j]);
        g.log_sigma.value[j] = weighted(m, g.log_sigma.value[j]);
      }
      sums.weights += part;
    }
    A part = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) part += costs.value[j];
    sums.a += part;
    take(i, g, count);
  };
  walk_ahead(vectors, Count<V>{}, [=](int g) { return head + nth<Way>(g, vectors) * V; }, load, use);
  walk_ahead(n - between, Count<1>{}, [=](int g) { return g < head ? g : g + between; }, load, use);
  return sums;
}

template <class A>
__device__ void write_sums(const MixedSums<A>& sums, const Partials& out, const Chunk& chunk) {
  const A a = warp_sum(sums.a), weights = warp_sum(sums.weights);
  if (lane() != 0) return;
  static_cast<A*>(out.a)[chunk.index] = a;
  if (out.weights) static_cast<A*>(out.weights)[chunk.index] = weights;
}

// Where a chunk's gradients go. They are dense, so that one number says where in all of them: three addresses would be
// too many for the registers.
struct MixedWritten {
  const Gradients& out;
  int64_t begin;

  __device__ MixedWritten(const Gradients& out, int64_t dims, const Chunk& p)
      : out(out), begin(p.sample * dims + p.first) {}

  // Elements before the first vector; n where there is none.
  template <class Elements>
  __device__ int head(const Elements& elements, int n) const {
    const int head = elements.head(n);
    const auto fit = [&](const Span& to) {
      return to.base == nullptr || fits(to.at(0, begin + head), to.itemsize, Elements::V);
    };
    return head < n && fit(out.recon) && fit(out.target) && fit(out.element_log_sigma) ? head : n;
  }

  template <class R, class A, int N>
  __device__ void put(int i, const MixedGrads<A, N>& g, Count<N> count) const {
    if (out.recon.base) {
      // In bytes: from an index of elements nvcc makes an access of each, in some of the kernels.
      char* to = out.recon.base + (begin + i) * static_cast<int64_t>(sizeof(R));
      store_values(reinterpret_cast<R*>(to), count, [&](int j) { return g.recon.value[j]; });
    }
    put(out.target, i, g.target, count);
    put(out.element_log_sigma, i, g.log_sigma, count);
  }

 private:
  template <class A, int N>
  __device__ void put(const Span& to, int i, const Values<A, N>& values, Count<N> count) const {
    if (to.base) store_any(to, to.at(0, begin + i), 0, count, [&](int j) { return values.value[j]; });
  }
};

// What a warp keeps on chip of its elements until their factor is known: see keeps_slopes.
template <class R>
struct KeptSlopes {
  using Elements = MixedChunk<float, R, false>;
  float* kept;
  MixedWritten out;

  __device__ KeptSlopes(float* kept, const Data& data, const Gradients& gradients, const Chunk& p)
      : kept(kept), out(gradients, data.dims, p) {}

  // Of element j of a lane's vector that begins at the i-th: in 32 banks for the lanes of a warp.
  template <int N>
  __device__ float& at(int i, int j, Count<N>) const {
    return kept[i + (j + lane() * N / kWarpSize) % N];
  }

  __device__ int head(const Elements& elements, int n) const {
    return out.head(elements, n);
  }

  // Returns the lane's sum.
  __device__ float keep(const Elements& elements, int n, int head) const {
    return mixed_sums(
               elements, n, head, 1.0f,
               [&](int i, const auto& g, auto count) {
#pragma unroll
                 for (int j = 0; j < count.n; ++j) at(i, j, count) = g.recon.value[j];
               })
        .a;
  }

  __device__ void write(int n, int head, float a) const {
    walk<1, Elements::V>(
        n, head,
        [&](int i, auto count) {
          MixedGrads<float, count.n> g;
#pragma unroll
          for (int j = 0; j < count.n; ++j) {
            g.recon.value[j] = a * at(i, j, count);
            g.target.value[j] = -g.recon.value[j];
          }
          return g;
        },
        [&](int i, const auto& g, auto count) { out.template put<R>(i, g, count); });
  }
};

}  // namespace elbo
