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

#define ELBO_ROLLED _Pragma("GCC unroll 1")
#define ELBO_APART inline __attribute__((noinline, cold))

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

template <class To, class From>
ELBO_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

ELBO_INLINE FloatV magnitude(FloatV x) {
  return bits_as<FloatV>(bits_as<IntV>(x) & 0x7FFFFFFF);
}

// Whether |x| is at most `bound` in all lanes, and none is NaN.
ELBO_INLINE bool all_within(FloatV x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(bits_as<__m512>(magnitude(x)), _mm512_set1_ps(bound), _CMP_LE_OQ) == 0xFFFF;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bits_as<__m256>(magnitude(x) <= bound)) == 0xFF;
#elif defined(__SSE2__)
  return _mm_movemask_ps(bits_as<__m128>(magnitude(x) <= bound)) == 0xF;
#else
  const IntV within = magnitude(x) <= bound;
  int32_t all = -1;
  for (size_t k = 0; k < sizeof within / sizeof all; ++k) all &= within[k];
  return all != 0;
#endif
}

// exp for float lanes to about 1 ulp; libm's scalar expf would cost some ten times as much. x = n log 2 + r,
// exp(x) = 2ⁿ (1 + r + rest). Plain: |x| ≤ kPlain in all lanes, so 2ⁿ and the results are normal numbers; it takes two
// thirds of the instructions.
constexpr float kPlain = 86;

template <bool Plain>
struct Exp {
  FloatV r, rest;
  IntV n;  // plus kRound's bits, of which shifts by 23 leave nothing

  static constexpr float kRound = 12582912;  // 1.5 · 2²³: adding it leaves no bits for a fraction

  // n = 0 and r = x where `near`, for |x| < ½; else |r| ≤ ½ log 2. A polynomial of degree 5 gives (exp(r) − 1 − r)/r²
  // to 2.4e-8 over both ranges.
  ELBO_INLINE Exp(FloatV x, IntV near) {
    if constexpr (!Plain) {
      x = x > 89.0f ? FloatV{} + 89.0f : x;  // overflows to inf later; NaN fails both tests
      x = x < -104.0f ? FloatV{} - 104.0f : x;
    }
    const FloatV shifted = bits_as<FloatV>(bits_as<IntV>(x * 1.44269504f) & ~near) + kRound;
    const FloatV rounded = shifted - kRound;
    r = (x - rounded * 0.693359375f) - rounded * -2.12194440e-4f;  // log 2 in two parts, the first exact times n
    FloatV p = FloatV{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    rest = p * r * r;
    n = bits_as<IntV>(shifted);
  }

  ELBO_INLINE FloatV exp() const {
    const FloatV x = 1.0f + (r + rest);
    if constexpr (Plain) return bits_as<FloatV>(bits_as<IntV>(x) + (n << 23));
    const IntV half = n >> 1;  // 2ⁿ in two factors: n reaches 128, and −150 for subnormal results
    return x * power_of_two(half) * power_of_two(n - half);
  }

 private:
  static ELBO_INLINE FloatV power_of_two(IntV n) {
    return bits_as<FloatV>((n + 127) << 23);
  }
};

// As the formulas in elbo_math.h, with one polynomial for the series and for exp.
template <bool Plain>
ELBO_INLINE FloatV exp_of(FloatV x) {
  return Exp<Plain>(x, IntV{}).exp();
}

template <bool Plain>
ELBO_INLINE FloatV expm1mx_of(FloatV t) {
  const IntV near = magnitude(t) < 0.5f;
  const Exp<Plain> e(t, near);
  return near ? e.rest : e.exp() - 1.0f - t;
}

template <bool Plain>
ELBO_INLINE FloatV expm1_of(FloatV t) {
  const IntV near = magnitude(t) < 0.5f;
  const Exp<Plain> e(t, near);
  return near ? e.r + e.rest : e.exp() - 1.0f;
}

// The rare ones, kept out of the loops.
ELBO_APART FloatV exp_of_any(FloatV x) {
  return exp_of<false>(x);
}

ELBO_APART FloatV expm1mx_of_any(FloatV t) {
  return expm1mx_of<false>(t);
}

ELBO_APART FloatV expm1_of_any(FloatV t) {
  return expm1_of<false>(t);
}

template <>
struct Lanes<FloatV> {
  using Scalar = float;
  static constexpr int64_t count = kVectorBytes / 4;

  static ELBO_INLINE FloatV exp(FloatV x) {
    return all_within(x, kPlain) ? exp_of<true>(x) : exp_of_any(x);
  }
};

template <>
ELBO_INLINE FloatV expm1mx(FloatV t) {
  return all_within(t, kPlain) ? expm1mx_of<true>(t) : expm1mx_of_any(t);
}

template <>
ELBO_INLINE FloatV expm1(FloatV t) {
  return all_within(t, kPlain) ? expm1_of<true>(t) : expm1_of_any(t);
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
    ELBO_ROLLED
    for (int k = 0; k < sum.at_once; ++k) sum.of[k] += f(i + k * L, AllLanes<A>{});
  }
  sum.add_rest(i, n, f);
  return sum.total();
}

}  // namespace elbo
