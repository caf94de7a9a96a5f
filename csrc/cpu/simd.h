// Vectors of lanes (GCC/Clang vector extensions), and what the element loops need of them.
//
// A vector is as wide as the instruction set's registers. GCC splits a wider one, but takes its comparisons, selections
// and shifts lane by lane then, which made the rate up to ten times as slow. Sums are taken by groups of 64 bytes,
// which are one, two or four vectors, so they have the same order, and the same bits, everywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../elbo_math.h"

namespace elbo {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
constexpr int64_t kGroupBytes = 64;

typedef float FloatV __attribute__((vector_size(kVectorBytes)));
typedef double DoubleV __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntV __attribute__((vector_size(kVectorBytes)));

// exp for float lanes to about 1 ulp; libm's scalar expf would cost some ten times as much.
template <>
struct Lanes<FloatV> {
  using Scalar = float;
  static constexpr int64_t count = kVectorBytes / 4;

  static ELBO_INLINE FloatV exp(FloatV x) {
    const Reduced e = reduced(x, IntV{});
    return e.scale(1.0f + (e.r + e.rest));
  }

  // x = n log 2 + r, exp(x) = 2ⁿ (1 + r + rest).
  struct Reduced {
    FloatV r, rest;
    IntV n;

    ELBO_INLINE FloatV scale(FloatV x) const {
      const IntV half = n >> 1;  // 2ⁿ in two factors: n reaches 128, and −150 for subnormal results
      return x * power_of_two(half) * power_of_two(n - half);
    }
  };

  // n = 0 and r = x where `near`, for |x| < ½; else |r| ≤ ½ log 2. A polynomial of degree 5 gives (exp(r) − 1 − r)/r²
  // to 2.4e-8 over both ranges.
  static ELBO_INLINE Reduced reduced(FloatV x, IntV near) {
    x = x > 89.0f ? FloatV{} + 89.0f : x;  // overflows to inf later; NaN fails both tests
    x = x < -104.0f ? FloatV{} - 104.0f : x;
    const FloatV round_to_int = FloatV{} + 12582912.0f;  // 1.5 · 2²³: adding it leaves no bits for a fraction
    const FloatV shifted = near ? round_to_int : x * 1.44269504f + round_to_int;
    const FloatV n = shifted - round_to_int;
    const FloatV r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // log 2 in two parts, the first exact times n
    FloatV p = FloatV{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    IntV bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return {r, p * r * r, bits - 0x4B400000};  // n is what `shifted` carries in its last bits
  }

 private:
  static ELBO_INLINE FloatV power_of_two(IntV n) {
    const IntV bits = (n + 127) << 23;
    FloatV f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
};

// As the formulas in elbo_math.h, with one polynomial for the series and for exp.
template <>
ELBO_INLINE FloatV excess(FloatV t) {
  const IntV near = is_small(t);
  const auto e = Lanes<FloatV>::reduced(t, near);
  return near ? e.rest : e.scale(1.0f + (e.r + e.rest)) - 1.0f - t;
}

template <>
ELBO_INLINE FloatV expm1(FloatV t) {
  const IntV near = is_small(t);
  const auto e = Lanes<FloatV>::reduced(t, near);
  return near ? e.r + e.rest : e.scale(1.0f + (e.r + e.rest)) - 1.0f;
}

// fp64 is for gradient checks, where libm's accuracy counts and its speed does not.
template <>
struct Lanes<DoubleV> {
  using Scalar = double;
  static constexpr int64_t count = kVectorBytes / 8;

  static ELBO_INLINE DoubleV exp(DoubleV x) {
    for (int i = 0; i < count; ++i) x[i] = std::exp(x[i]);
    return x;
  }
};

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

// Calls f(i, lanes) over [0, n), a vector at a time, the last one partly filled.
template <class A, class F>
ELBO_INLINE void for_lanes(int64_t n, F f) {
  int64_t i = 0;
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

// Σ of f(i, lanes) over [0, n)
template <class A, class F>
ELBO_INLINE A sum_lanes(int64_t n, F f) {
  constexpr int64_t L = kLanes<A>;
  Sum<A> sum;
  int64_t i = 0;
  for (; i + sum.at_once * L <= n; i += sum.at_once * L) {
    ELBO_UNROLL
    for (int k = 0; k < sum.at_once; ++k) sum.of[k] += f(i + k * L, AllLanes<A>{});
  }
  sum.add_rest(i, n, f);
  return sum.total();
}

}  // namespace elbo
