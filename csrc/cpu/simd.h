// What the element loops need of vectors: how many lanes there are, loops over them, sums.
#pragma once

#include "exp.h"

namespace elbo {

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatV;
};
template <>
struct VectorOf<double> {
  using type = DoubleV;
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int64_t kLanes = Lanes<Vector<A>>::count;

// How many lanes of a vector are in use: all of them, as a constant that turns loads into one instruction; or fewer.
template <class A>
using AllLanes = std::integral_constant<int64_t, kLanes<A>>;

// All of four vectors, of float lanes. Loops over formulas with an exp take them so.
struct FourVectors {};
template <class A>
constexpr bool kAbreast = std::is_same_v<A, float>;

// A vector as many times as `lanes` are of.
template <class V, class N>
ELBO_INLINE auto repeated(V v, N) {
  if constexpr (std::is_same_v<N, FourVectors>) {
    return four_of([&](int) { return v; });
  } else {
    return v;
  }
}

// Calls f(i, lanes) over [0, n), a vector at a time, the last one partly filled; Abreast: four at a time first.
template <class A, bool Abreast = false, class F>
ELBO_INLINE void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  if constexpr (Abreast) {
    for (; i + 4 * kLanes<A> <= n; i += 4 * kLanes<A>) f(i, FourVectors{});
  }
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, AllLanes<A>{});
  if (i < n) f(i, n - i);
}

// A sum in an order that only the number of its terms decides: groups go to four accumulators in turn, or the adds
// would wait for each other; what is left after the last four, to the first one, and what is less than a group, to the
// second. (A plain `omp simd` reduction was not vectorised.)
template <class A>
struct Sum {
  static constexpr int64_t parts = kGroupBytes / kVectorBytes;  // vectors of a group
  static constexpr int64_t at_once = 4 * parts;                 // of the four groups
  Vector<A> of[at_once] = {};

  // f(i, lanes) over [i, n), which is less than four groups.
  template <class F>
  ELBO_INLINE void add_rest(int64_t i, int64_t n, F f) {
    constexpr int64_t L = kLanes<A>;
    for (; i + parts * L <= n; i += parts * L) {
      ELBO_UNROLL
      for (int k = 0; k < parts; ++k) of[k] += f(i + k * L, AllLanes<A>{});
    }
    for (int64_t k = parts; i < n; ++k, i += L) {
      const int64_t lanes = std::min(L, n - i);
      Vector<A> last = f(i, lanes);
      for (int64_t j = lanes; j < L; ++j) last[j] = 0;  // lanes past the end hold f(0, …), which need not be 0
      of[k] += last;
    }
  }

  ELBO_INLINE A total() const {
    Vector<A> v[parts];
    for (int k = 0; k < parts; ++k) v[k] = (of[k] + of[k + parts]) + (of[k + 2 * parts] + of[k + 3 * parts]);
    for (int width = parts / 2; width > 0; width /= 2) {
      for (int k = 0; k < width; ++k) v[k] += v[k + width];
    }
    for (int64_t width = kLanes<A> / 2; width > 0; width /= 2) {
      for (int64_t k = 0; k < width; ++k) v[0][k] += v[0][k + width];
    }
    return v[0][0];
  }
};

// Σ of f(i, lanes) over [0, n); Abreast: as above, with the same sum.
template <class A, bool Abreast = false, class F>
ELBO_INLINE A sum_lanes(int64_t n, F f) {
  constexpr int64_t L = kLanes<A>;
  Sum<A> sum;
  int64_t i = 0;
  for (; i + sum.at_once * L <= n; i += sum.at_once * L) {
    if constexpr (Abreast) {
      ELBO_ROLLED
      for (int k = 0; k < sum.at_once; k += 4) {
        const auto four = f(i + k * L, FourVectors{});
        for (int j = 0; j < 4; ++j) sum.of[k + j] += four.of[j];
      }
    } else {
      ELBO_ROLLED
      for (int k = 0; k < sum.at_once; ++k) sum.of[k] += f(i + k * L, AllLanes<A>{});
    }
  }
  sum.add_rest(i, n, f);
  return sum.total();
}

}  // namespace elbo
