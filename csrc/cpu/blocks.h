// What is done to a block of data where σ does not vary inside a sample: by the stages one after the other, by the
// single pass at once.
#pragma once

#include "elbo.h"
#include "tasks.h"

namespace elbo {

// Calls f(recon, target) with a block of n elements of each.
template <class A, class F>
ELBO_INLINE void with_block(const Data& data, int64_t sample, int64_t first, int64_t n, F f) {
  A scratch[2][kBlock];
  f(read(data.recon, sample, first, n, scratch[0]), read(data.target, sample, first, n, scratch[1]));
}

// Σ e²
template <class A>
ELBO_INLINE A squared_error(const A* r, const A* t, int64_t n) {
  return sum_lanes<A>(n, [&](int64_t i, auto lanes) {
    const Vector<A> e = load(r + i, lanes) - load(t + i, lanes);
    return e * e;
  });
}

template <class A>
ELBO_INLINE void scaled_difference(
    A a, const A* __restrict x, const A* __restrict y, const Span& out, int64_t sample, int64_t first, int64_t n) {
  A scratch[kBlock];
  A* __restrict g = write_to(out, sample, first, scratch);
  for (int64_t i = 0; i < n; ++i) g[i] = a * (x[i] - y[i]);
  written(out, sample, first, n, scratch);
}

// The same past the caches, for an `out` of A's dtype.
template <class A>
ELBO_INLINE void scaled_difference_streamed(A a, const A* x, const A* y, A* g, int64_t n) {
  const int64_t behind = reinterpret_cast<uintptr_t>(g) % kVectorBytes / sizeof(A);
  const int64_t head = std::min<int64_t>(n, behind ? kLanes<A> - behind : 0);
  for (int64_t i = 0; i < head; ++i) g[i] = a * (x[i] - y[i]);
  int64_t i = head;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    stream<Vector<A>>(g + i, a * (load(x + i, AllLanes<A>{}) - load(y + i, AllLanes<A>{})));
  }
  for (; i < n; ++i) g[i] = a * (x[i] - y[i]);
  streamed();
}

// a e for recon, and its negative for the target
template <class A>
ELBO_INLINE void data_gradient(
    A a, const A* r, const A* t, int64_t sample, int64_t first, int64_t n, const Gradients& out) {
  const auto write = [&](const Span& to, const A* x, const A* y) {
    if (to.base && out.past_caches && to.dtype == kDtype<A>) {
      scaled_difference_streamed(a, x, y, write_to<A>(to, sample, first, nullptr), n);
    } else if (to.base) {
      scaled_difference(a, x, y, to, sample, first, n);
    }
  };
  write(out.recon, r, t);
  write(out.target, t, r);
}

template <class A>
ELBO_INLINE double chunk_sum(const Data& data, int64_t sample, int64_t chunk) {
  double sum = 0;
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    with_block<A>(data, sample, first, n, [&](const A* r, const A* t) { sum += squared_error(r, t, n); });
  });
  return sum;
}

template <class A>
ELBO_INLINE void chunk_gradient(const Data& data, A a, int64_t sample, int64_t chunk, const Gradients& out) {
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    with_block<A>(
        data, sample, first, n, [&](const A* r, const A* t) { data_gradient(a, r, t, sample, first, n, out); });
  });
}

}  // namespace elbo
