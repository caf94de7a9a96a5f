// Where the results of a block go: straight into tensors of what is computed with, past the caches if they may; else
// into scratch, and from there, converted, into the tensors that want them.
#pragma once

#include "convert.h"

namespace elbo {

// Whether several results are written past the caches side by side. With vectors of half a line, on an AMD EPYC, that
// took twice as long as through the caches; with two vectors of each result at a time, or with one result after the
// other from scratch, still a third longer.
constexpr bool kSideBySide = kVectorBytes == 64;

// Where to put lanes, by value: behind a pointer, every store might change it.
template <class A, int Count>
struct Places {
  A* at[Count];
  bool past_caches[Count];

  ELBO_INLINE void put(int k, int64_t i, const Four<Vector<A>>& v, FourVectors) const {
    ELBO_UNROLL
    for (int j = 0; j < 4; ++j) put(k, i + j * kLanes<A>, v.of[j], AllLanes<A>{});
  }

  template <class N>
  ELBO_INLINE void put(int k, int64_t i, Vector<A> v, N lanes) const {
    if (std::is_same_v<N, AllLanes<A>> && past_caches[k]) {
      stream(at[k] + i, v);
    } else {
      store(at[k] + i, v, lanes);
    }
  }
};

// Computes a block of n elements by f(i, lanes, places), which puts them there; and returns where they lie, if they
// did not go past the caches.
template <bool Abreast = false, class A, int Count, class F>
ELBO_INLINE Places<A, Count> write_block(
    const Span* const (&spans)[Count], A (&scratch)[Count][kBlock], int64_t sample, int64_t first, int64_t n,
    bool past_caches, F f) {
  Places<A, Count> places;
  bool any_past_caches = false;
  for (int k = 0; k < Count; ++k) {
    places.at[k] = spans[k]->base ? write_to(*spans[k], sample, first, scratch[k]) : scratch[k];
    const bool aligned = reinterpret_cast<uintptr_t>(places.at[k]) % kVectorBytes == 0;
    places.past_caches[k] = kSideBySide && past_caches && aligned && places.at[k] != scratch[k];
    any_past_caches |= places.past_caches[k];
  }
  for_lanes<A, Abreast>(n, [&](int64_t i, auto lanes) { f(i, lanes, places); });
  for (int k = 0; k < Count; ++k) {
    if (spans[k]->base) written(*spans[k], sample, first, n, places.at[k]);
  }
  if (any_past_caches) streamed();
  return places;
}

}  // namespace elbo
