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

// a e for recon, and its negative for the target
template <class A>
ELBO_INLINE void data_gradient(
    A a, const A* r, const A* t, int64_t sample, int64_t first, int64_t n, const Gradients& out) {
  if (out.recon.base) scaled_difference(a, r, t, out.recon, sample, first, n);
  if (out.target.base) scaled_difference(a, t, r, out.target, sample, first, n);
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
