// exp and what is made of it, for vectors of lanes.
#pragma once

#include "vectors.h"

namespace elbo {

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

ELBO_INLINE IntV are_plain(FloatV x) {
  return magnitude(x) <= kPlain;
}

template <class V>
ELBO_INLINE auto are_plain(const Four<V>& x) {
  return (are_plain(x.of[0]) & are_plain(x.of[1])) & (are_plain(x.of[2]) & are_plain(x.of[3]));
}

template <class... V>
ELBO_INLINE bool all_plain(const V&... x) {
  return all_true((... & are_plain(x)));
}

// exp for float lanes to about 1 ulp; libm's scalar expf would cost some ten times as much. x = n log 2 + r with
// |r| ≤ ½ log 2, and exp(r) = 1 + r + r² second.
//
// What a loop waits for is the longest chain of instructions, since a processor sees too few vectors ahead to fill the
// time. So the polynomial goes by pairs of its terms, where each step of Horner's scheme would wait for the one before,
// and 2ⁿ is multiplied with what is known first.
template <class V>
struct Exp {
  using Ints = decltype(bits_of(V{}));

  V r, r2, second;
  Ints n;  // plus kRound's bits, of which shifts by 23 leave nothing

  static constexpr float kRound = 12582912;  // 1.5 · 2²³: adding it leaves no bits for a fraction

  // `second` is a polynomial of degree 5, right to 2.4e-8.
  ELBO_INLINE explicit Exp(const V& x) {
    const V shifted = x * 1.44269504f + kRound;
    const V rounded = shifted - kRound;
    r = (x - rounded * 0.693359375f) - rounded * -2.12194440e-4f;  // log 2 in two parts, the first exact times n
    r2 = r * r;
    const V high = 1.9875691500e-4f * r + 1.3981999507e-3f;
    const V middle = 8.3334519073e-3f * r + 4.1665795894e-2f;
    const V low = 1.6666665459e-1f * r + 5.0000001201e-1f;
    second = (high * r2 + middle) * r2 + low;
    n = bits_of(shifted);
  }

  // exp(x), of a plain number
  ELBO_INLINE V exp() const {
    return as_floats(bits_of(1.0f + (r + r2 * second)) + (n << 23));
  }

  // The same of a number from −104 to 89, whose exp may be subnormal or infinite: 2ⁿ in two factors.
  ELBO_INLINE V exp_by_halves() const {
    const Ints half = n >> 1;
    return (1.0f + (r + r2 * second)) * power_of_two(half) * power_of_two(n - half);
  }

  // exp(x) − 1, of a plain number. Where n = 0, r is x, and what r² second is added to is exact: nothing cancels
  // near 0.
  ELBO_INLINE V expm1() const {
    const V power = power_of_two(n);
    return power * r2 * second + (power * r + (power - 1.0f));
  }

  // exp(x) − 1 − x, of a plain number x
  ELBO_INLINE V expm1mx(const V& x) const {
    const V power = power_of_two(n);
    return power * r2 * second + (power * r + ((power - 1.0f) - x));
  }

 private:
  static ELBO_INLINE V power_of_two(const Ints& n) {
    return as_floats((n << 23) + 0x3F800000);
  }
};

// Of any numbers, plain ones among them: those have the same bits here. Kept out of the loops.
ELBO_APART FloatV exp_of_any(FloatV x) {
  FloatV bounded = x > 89.0f ? FloatV{} + 89.0f : x;  // NaN fails both tests
  bounded = x < -104.0f ? FloatV{} - 104.0f : bounded;
  return Exp<FloatV>(bounded).exp_by_halves();
}

ELBO_APART FloatV expm1_of_any(FloatV x) {
  return magnitude(x) <= kPlain ? Exp<FloatV>(x).expm1() : exp_of_any(x) - 1.0f;
}

ELBO_APART FloatV expm1mx_of_any(FloatV x) {
  return magnitude(x) <= kPlain ? Exp<FloatV>(x).expm1mx(x) : exp_of_any(x) - 1.0f - x;
}

ELBO_APART Four<FloatV> exp_of_any(const Four<FloatV>& x) {
  return four_of([&](int k) { return exp_of_any(x.of[k]); });
}

ELBO_APART Four<FloatV> expm1_of_any(const Four<FloatV>& x) {
  return four_of([&](int k) { return expm1_of_any(x.of[k]); });
}

ELBO_APART Four<FloatV> expm1mx_of_any(const Four<FloatV>& x) {
  return four_of([&](int k) { return expm1mx_of_any(x.of[k]); });
}

// What the formulas take of float lanes. The two functions of two numbers have no branch between them, so that their
// instructions overlap.
template <class V>
struct FloatLanes {
  using Scalar = float;

  static ELBO_INLINE V exp(const V& x) {
    return all_plain(x) ? Exp<V>(x).exp() : exp_of_any(x);
  }

  static ELBO_INLINE V expm1(const V& x) {
    return all_plain(x) ? Exp<V>(x).expm1() : expm1_of_any(x);
  }

  static ELBO_INLINE V expm1mx(const V& x) {
    return all_plain(x) ? Exp<V>(x).expm1mx(x) : expm1mx_of_any(x);
  }

  static ELBO_INLINE ExpAnd<V> exp_and_expm1(const V& a, const V& b) {
    if (!all_plain(a, b)) return {exp_of_any(a), expm1_of_any(b)};
    return {Exp<V>(a).exp(), Exp<V>(b).expm1()};
  }

  static ELBO_INLINE ExpAnd<V> exp_and_expm1mx(const V& a, const V& b) {
    if (!all_plain(a, b)) return {exp_of_any(a), expm1mx_of_any(b)};
    return {Exp<V>(a).exp(), Exp<V>(b).expm1mx(b)};
  }
};

template <>
struct Lanes<FloatV> : FloatLanes<FloatV> {
  static constexpr int64_t count = kVectorBytes / 4;
};

template <>
struct Lanes<Four<FloatV>> : FloatLanes<Four<FloatV>> {};

#define ELBO_OF_FLOATS(V)                           \
  template <>                                       \
  ELBO_INLINE V expm1(V x) {                        \
    return Lanes<V>::expm1(x);                      \
  }                                                 \
  template <>                                       \
  ELBO_INLINE V expm1mx(V x) {                      \
    return Lanes<V>::expm1mx(x);                    \
  }                                                 \
  template <>                                       \
  ELBO_INLINE ExpAnd<V> exp_and_expm1(V a, V b) {   \
    return Lanes<V>::exp_and_expm1(a, b);           \
  }                                                 \
  template <>                                       \
  ELBO_INLINE ExpAnd<V> exp_and_expm1mx(V a, V b) { \
    return Lanes<V>::exp_and_expm1mx(a, b);         \
  }
ELBO_OF_FLOATS(FloatV)
ELBO_OF_FLOATS(Four<FloatV>)
#undef ELBO_OF_FLOATS

// exp of numbers that are at most a rounding above 0, and mostly far below: what is below −kPlain counts as −kPlain, so
// that there is no branch. NaN passes.
template <class V>
ELBO_INLINE V exp_of_negative(const V& x) {
  return Exp<V>(select(x < -kPlain, V{} - kPlain, x)).exp();
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

}  // namespace elbo
