// What is done to a block of data where σ does not vary inside a sample and elements have no weights: by the stages one
// after the other, by the single pass at once. elements.h has the rest.
#pragma once

#include "elements.h"
#include "tasks.h"

namespace elbo {

// Calls f(recon, target) with a block of n elements of each: as they lie, if lanes are loaded from both in one way,
// else converted; with x̂ for recon where there is an activation.
template <class A, class F>
ELBO_INLINE void with_block(const Data& data, int64_t sample, int64_t first, int64_t n, F f) {
  if constexpr (std::is_same_v<A, float>) {
    const bool alike = data.recon.dtype == data.target.dtype && data.activation == kNoActivation;
    if (alike && data.recon.dtype == ScalarType::BFloat16) {
      return f(as<const BFloat16>(data.recon, sample, first), as<const BFloat16>(data.target, sample, first));
    }
    if (alike && data.recon.dtype == ScalarType::Half) {
      return f(as<const Half>(data.recon, sample, first), as<const Half>(data.target, sample, first));
    }
  }
  A scratch[2][kBlock];
  const A* r = read_recon<A>(data, sample, first, n, scratch[0], nullptr);
  f(r, read_target(data, sample, first, n, scratch[1]));
}

// Σ |e|^q
template <int Q, class T>
ELBO_INLINE double error_sum(const T* r, const T* t, int64_t n) {
  using A = Computed<T>;
  constexpr int64_t L = kLanes<A>;
  Sum<A> sum;
  int64_t i = 0;
  for (; i + sum.at_once * L <= n; i += sum.at_once * L) {
    ELBO_UNROLL
    for (int k = 0; k < sum.at_once; k += 2) {
      const auto x = load_two(r + i + k * L), y = load_two(t + i + k * L);
      sum.of[k] += power<Q>(difference(x.first, y.first));
      sum.of[k + 1] += power<Q>(difference(x.second, y.second));
    }
  }
  for (int k = 0; k < sum.at_once; k += 2) {
    const auto pair = in_order<T>(Two<Vector<A>>{sum.of[k], sum.of[k + 1]});
    sum.of[k] = pair.first;
    sum.of[k + 1] = pair.second;
  }
  sum.add_rest(
      i, n, [&](int64_t j, auto lanes) { return power<Q>(difference(load(r + j, lanes), load(t + j, lanes))); });
  return sum.total();
}

// g = a · slope(x − y), past the caches where g begins at a multiple of a vector.
template <int Q, bool PastCaches, class A, class T>
ELBO_INLINE void scaled_difference(A a, const T* x, const T* y, T* g, int64_t n) {
  constexpr int64_t L = kLanes<A>;
  const Vector<A> factor = Vector<A>{} + a;
  const auto of = [&](Vector<A> u, Vector<A> v) { return scaled_slope<Q>(factor, difference(u, v)); };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const auto u = load_two(x + i), v = load_two(y + i);
    store_two<PastCaches>(g + i, {of(u.first, v.first), of(u.second, v.second)});
  }
  for (; i < n; i += L) {
    const int64_t lanes = std::min(L, n - i);
    store(g + i, of(load(x + i, lanes), load(y + i, lanes)), lanes);
  }
}

// The same past the caches.
template <int Q, class A, class T>
ELBO_INLINE void scaled_difference_streamed(A a, const T* x, const T* y, T* g, int64_t n) {
  const int64_t behind = reinterpret_cast<uintptr_t>(g) % kVectorBytes;
  const int64_t head = std::min<int64_t>(n, behind ? (kVectorBytes - behind) / sizeof(T) : 0);
  if (head) scaled_difference<Q, false>(a, x, y, g, head);
  scaled_difference<Q, true>(a, x + head, y + head, g + head, n - head);
  streamed();
}

// a · slope(e) for recon, and its negative for the target
template <int Q, class A, class T>
ELBO_INLINE void data_gradient(
    A a, const T* r, const T* t, int64_t sample, int64_t first, int64_t n, const Gradients& out) {
  const auto write = [&](const Span& to, const T* x, const T* y) {
    if (!to.base) return;
    if (to.dtype != kDtype<T>) {
      if constexpr (std::is_same_v<T, A>) {  // else what is read as T is written so, too
        A scratch[kBlock];
        scaled_difference<Q, false>(a, x, y, scratch, n);
        written(to, sample, first, n, scratch);
      }
    } else if (out.past_caches) {
      scaled_difference_streamed<Q>(a, x, y, as<T>(to, sample, first), n);
    } else {
      scaled_difference<Q, false>(a, x, y, as<T>(to, sample, first), n);
    }
  };
  write(out.recon, r, t);
  write(out.target, t, r);
}

template <class A, int Q>
ELBO_INLINE double chunk_sum(const Data& data, int64_t sample, int64_t chunk) {
  double sum = 0;
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    with_block<A>(data, sample, first, n, [&](const auto* r, const auto* t) { sum += error_sum<Q>(r, t, n); });
  });
  return sum;
}

template <class A, int Q>
ELBO_INLINE void chunk_gradient(const Data& data, A a, int64_t sample, int64_t chunk, const Gradients& out) {
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    with_block<A>(data, sample, first, n, [&](const auto* r, const auto* t) {
      data_gradient<Q>(a, r, t, sample, first, n, out);
    });
  });
}

}  // namespace elbo
