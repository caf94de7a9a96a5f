// What is done to a block of data where σ does not vary inside a sample: by the stages one after the other, by the
// single pass at once.
#pragma once

#include "elbo.h"
#include "tasks.h"

namespace elbo {

// Calls f(recon, target) with a block of n elements of each: as they lie, if lanes are loaded from both in one way,
// else converted.
template <class A, class F>
ELBO_INLINE void with_block(const Data& data, int64_t sample, int64_t first, int64_t n, F f) {
  if constexpr (std::is_same_v<A, float>) {
    const bool alike = data.recon.dtype == data.target.dtype;
    if (alike && data.recon.dtype == ScalarType::BFloat16) {
      return f(as<const BFloat16>(data.recon, sample, first), as<const BFloat16>(data.target, sample, first));
    }
    if (alike && data.recon.dtype == ScalarType::Half) {
      return f(as<const Half>(data.recon, sample, first), as<const Half>(data.target, sample, first));
    }
  }
  A scratch[2][kBlock];
  f(read(data.recon, sample, first, n, scratch[0]), read(data.target, sample, first, n, scratch[1]));
}

// Σ e²
template <class T>
ELBO_INLINE double squared_error(const T* r, const T* t, int64_t n) {
  using A = Computed<T>;
  return sum_lanes<A>(n, [&](int64_t i, auto lanes) {
    const Vector<A> e = load(r + i, lanes) - load(t + i, lanes);
    return e * e;
  });
}

template <class A, class T, class G>
ELBO_INLINE void scaled_difference(A a, const T* x, const T* y, G* g, int64_t n) {
  for_lanes<A>(n, [&](int64_t i, auto lanes) { store(g + i, a * (load(x + i, lanes) - load(y + i, lanes)), lanes); });
}

// The same past the caches.
template <class A, class T>
ELBO_INLINE void scaled_difference_streamed(A a, const T* x, const T* y, T* g, int64_t n) {
  const int64_t behind = reinterpret_cast<uintptr_t>(g) % kStoredBytes<T> / sizeof(T);
  const int64_t head = std::min<int64_t>(n, behind ? kLanes<A> - behind : 0);
  const int64_t tail = head + (n - head) / kLanes<A> * kLanes<A>;
  if (head) scaled_difference(a, x, y, g, head);
  for (int64_t i = head; i < tail; i += kLanes<A>) {
    stream(g + i, a * (load(x + i, AllLanes<A>{}) - load(y + i, AllLanes<A>{})));
  }
  if (tail < n) scaled_difference(a, x + tail, y + tail, g + tail, n - tail);
  streamed();
}

// a e for recon, and its negative for the target
template <class A, class T>
ELBO_INLINE void data_gradient(
    A a, const T* r, const T* t, int64_t sample, int64_t first, int64_t n, const Gradients& out) {
  const auto write = [&](const Span& to, const T* x, const T* y) {
    if (!to.base) return;
    if (to.dtype != kDtype<T>) {
      A scratch[kBlock];
      scaled_difference(a, x, y, scratch, n);
      written(to, sample, first, n, scratch);
    } else if (out.past_caches) {
      scaled_difference_streamed(a, x, y, as<T>(to, sample, first), n);
    } else {
      scaled_difference(a, x, y, as<T>(to, sample, first), n);
    }
  };
  write(out.recon, r, t);
  write(out.target, t, r);
}

template <class A>
ELBO_INLINE double chunk_sum(const Data& data, int64_t sample, int64_t chunk) {
  double sum = 0;
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    with_block<A>(data, sample, first, n, [&](const auto* r, const auto* t) { sum += squared_error(r, t, n); });
  });
  return sum;
}

template <class A>
ELBO_INLINE void chunk_gradient(const Data& data, A a, int64_t sample, int64_t chunk, const Gradients& out) {
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    with_block<A>(
        data, sample, first, n, [&](const auto* r, const auto* t) { data_gradient(a, r, t, sample, first, n, out); });
  });
}

}  // namespace elbo
