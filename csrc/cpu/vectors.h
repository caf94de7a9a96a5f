// Vectors of lanes (GCC/Clang vector extensions), and four of them at once. No library of vectors: users' machines
// compile this, with the compiler that is there and no download, and elbo_math.h is one text for vectors and threads.
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

// Four vectors that go through the same arithmetic side by side. A long formula is one chain of instructions that wait
// for each other, and a processor sees two or three vectors ahead: too few to fill the time, where the formula is of
// one.
template <class V>
struct Four {
  V of[4];
};

template <class F>
ELBO_INLINE auto four_of(F f) {
  return Four<decltype(f(0))>{f(0), f(1), f(2), f(3)};
}

#define ELBO_FOUR(op)                                                            \
  template <class V>                                                             \
  ELBO_INLINE auto operator op(const Four<V>& a, const Four<V>& b) {             \
    return four_of([&](int k) { return a.of[k] op b.of[k]; });                   \
  }                                                                              \
  template <class V, class S, class = std::enable_if_t<std::is_arithmetic_v<S>>> \
  ELBO_INLINE auto operator op(const Four<V>& a, S b) {                          \
    return four_of([&](int k) { return a.of[k] op b; });                         \
  }                                                                              \
  template <class V, class S, class = std::enable_if_t<std::is_arithmetic_v<S>>> \
  ELBO_INLINE auto operator op(S a, const Four<V>& b) {                          \
    return four_of([&](int k) { return a op b.of[k]; });                         \
  }
ELBO_FOUR(+)
ELBO_FOUR(-)
ELBO_FOUR(*)
ELBO_FOUR(/)
ELBO_FOUR(<<)
ELBO_FOUR(|)
ELBO_FOUR(<)
ELBO_FOUR(>)
ELBO_FOUR(>=)
ELBO_FOUR(==)
#undef ELBO_FOUR

template <class V>
ELBO_INLINE Four<V> operator-(const Four<V>& a) {
  return four_of([&](int k) { return -a.of[k]; });
}

template <class Mask, class V>
ELBO_INLINE Four<V> select(const Four<Mask>& condition, const Four<V>& a, const Four<V>& b) {
  return four_of([&](int k) { return select(condition.of[k], a.of[k], b.of[k]); });
}

template <class To, class From>
ELBO_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

ELBO_INLINE IntV bits_of(FloatV x) {
  return bits_as<IntV>(x);
}

ELBO_INLINE FloatV as_floats(IntV bits) {
  return bits_as<FloatV>(bits);
}

ELBO_INLINE Four<IntV> bits_of(const Four<FloatV>& x) {
  return four_of([&](int k) { return bits_of(x.of[k]); });
}

ELBO_INLINE Four<FloatV> as_floats(const Four<IntV>& bits) {
  return four_of([&](int k) { return as_floats(bits.of[k]); });
}

template <>
ELBO_INLINE FloatV magnitude(FloatV x) {
  return as_floats(bits_of(x) & 0x7FFFFFFF);
}

template <>
ELBO_INLINE Four<FloatV> magnitude(Four<FloatV> x) {
  return four_of([&](int k) { return magnitude(x.of[k]); });
}

}  // namespace elbo
