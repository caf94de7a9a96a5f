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

template <>
ELBO_INLINE FloatV magnitude(FloatV x) {
  return bits_as<FloatV>(bits_as<IntV>(x) & 0x7FFFFFFF);
}

// Whether a comparison holds in all lanes.
ELBO_INLINE bool all_true(IntV holds) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(bits_as<__m512i>(holds)) == 0xFFFF;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bits_as<__m256>(holds)) == 0xFF;
#elif defined(__SSE2__)
  return _mm_movemask_ps(bits_as<__m128>(holds)) == 0xF;
#else
  int32_t all = -1;
  for (size_t k = 0; k < sizeof holds / sizeof all; ++k) all &= holds[k];
  return all != 0;
#endif
}

// Whether all numbers of all vectors are of magnitude kPlain at most, and none is NaN: 2ⁿ below is then a normal
// number, as are the results. Others are rare, and take a third more instructions.
constexpr float kPlain = 86;

template <class... V>
ELBO_INLINE bool all_plain(V... x) {
  return all_true((... & (magnitude(x) <= kPlain)));
}

// exp for float lanes to about 1 ulp; libm's scalar expf would cost some ten times as much. x = n log 2 + r with
// |r| ≤ ½ log 2, and exp(r) = 1 + r + r² second.
//
// What a loop waits for is the longest chain of instructions, since a processor sees too few vectors ahead to fill the
// time. So the polynomial goes by pairs of its terms, where each step of Horner's scheme would wait for the one before,
// and 2ⁿ is multiplied with what is known first.
struct Exp {
  FloatV r, r2, second;
  IntV n;  // plus kRound's bits, of which shifts by 23 leave nothing

  static constexpr float kRound = 12582912;  // 1.5 · 2²³: adding it leaves no bits for a fraction

  // `second` is a polynomial of degree 5, right to 2.4e-8.
  ELBO_INLINE explicit Exp(FloatV x) {
    const FloatV shifted = x * 1.44269504f + kRound;
    const FloatV rounded = shifted - kRound;
    r = (x - rounded * 0.693359375f) - rounded * -2.12194440e-4f;  // log 2 in two parts, the first exact times n
    r2 = r * r;
    const FloatV high = 1.9875691500e-4f * r + 1.3981999507e-3f;
    const FloatV middle = 8.3334519073e-3f * r + 4.1665795894e-2f;
    const FloatV low = 1.6666665459e-1f * r + 5.0000001201e-1f;
    second = (high * r2 + middle) * r2 + low;
    n = bits_as<IntV>(shifted);
  }

  // exp(x), of a plain number
  ELBO_INLINE FloatV exp() const {
    return bits_as<FloatV>(bits_as<IntV>(1.0f + (r + r2 * second)) + (n << 23));
  }

  // The same of a number from −104 to 89, whose exp may be subnormal or infinite: 2ⁿ in two factors.
  ELBO_INLINE FloatV exp_by_halves() const {
    const IntV half = n >> 1;
    return (1.0f + (r + r2 * second)) * power_of_two(half) * power_of_two(n - half);
  }

  // exp(x) − 1, of a plain number. Where n = 0, r is x, and what r² second is added to is exact: nothing cancels
  // near 0.
  ELBO_INLINE FloatV expm1() const {
    const FloatV power = power_of_two(n);
    return power * r2 * second + (power * r + (power - 1.0f));
  }

  // exp(x) − 1 − x, of a plain number x
  ELBO_INLINE FloatV expm1mx(FloatV x) const {
    const FloatV power = power_of_two(n);
    return power * r2 * second + (power * r + ((power - 1.0f) - x));
  }

 private:
  static ELBO_INLINE FloatV power_of_two(IntV n) {
    return bits_as<FloatV>((n << 23) + bits_as<IntV>(FloatV{} + 1.0f));
  }
};

// Of any numbers, plain ones among them: those have the same bits here. Kept out of the loops.
ELBO_APART FloatV exp_of_any(FloatV x) {
  FloatV bounded = x > 89.0f ? FloatV{} + 89.0f : x;  // NaN fails both tests
  bounded = x < -104.0f ? FloatV{} - 104.0f : bounded;
  return Exp(bounded).exp_by_halves();
}

ELBO_APART FloatV expm1_of_any(FloatV x) {
  return magnitude(x) <= kPlain ? Exp(x).expm1() : exp_of_any(x) - 1.0f;
}

ELBO_APART FloatV expm1mx_of_any(FloatV x) {
  return magnitude(x) <= kPlain ? Exp(x).expm1mx(x) : exp_of_any(x) - 1.0f - x;
}

template <>
struct Lanes<FloatV> {
  using Scalar = float;
  static constexpr int64_t count = kVectorBytes / 4;

  static ELBO_INLINE FloatV exp(FloatV x) {
    return all_plain(x) ? Exp(x).exp() : exp_of_any(x);
  }
};

template <>
ELBO_INLINE FloatV expm1(FloatV x) {
  return all_plain(x) ? Exp(x).expm1() : expm1_of_any(x);
}

template <>
ELBO_INLINE FloatV expm1mx(FloatV x) {
  return all_plain(x) ? Exp(x).expm1mx(x) : expm1mx_of_any(x);
}

// The two at once: without a branch between them their instructions overlap.
template <>
ELBO_INLINE ExpAnd<FloatV> exp_and_expm1(FloatV a, FloatV b) {
  if (!all_plain(a, b)) return {exp_of_any(a), expm1_of_any(b)};
  return {Exp(a).exp(), Exp(b).expm1()};
}

template <>
ELBO_INLINE ExpAnd<FloatV> exp_and_expm1mx(FloatV a, FloatV b) {
  if (!all_plain(a, b)) return {exp_of_any(a), expm1mx_of_any(b)};
  return {Exp(a).exp(), Exp(b).expm1mx(b)};
}

// exp of numbers that are at most a rounding above 0, and mostly far below: what is below −kPlain counts as −kPlain, so
// that there is no branch. NaN passes.
ELBO_INLINE FloatV exp_of_negative(FloatV x) {
  return Exp(x < -kPlain ? FloatV{} - kPlain : x).exp();
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

ELBO_INLINE DoubleV exp_of_negative(DoubleV x) {
  return Lanes<DoubleV>::exp(x);
}

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
