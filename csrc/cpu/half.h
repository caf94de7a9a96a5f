// Lanes of float from bf16 and fp16 numbers, and back: in vector instructions, whatever the instruction set has for it.
// Rounding is PyTorch's: to the nearest, ties to even.
#pragma once

#include "../span.h"
#include "simd.h"

namespace elbo {

typedef uint32_t Bits32V __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Bits16V __attribute__((vector_size(kVectorBytes / 2)));  // as many as there are float lanes
typedef uint16_t TwiceV __attribute__((vector_size(kVectorBytes)));       // twice as many

// Vectors that are loaded, or stored, at once.
template <class V>
struct Two {
  V first, second;
};

// A vector of 16-bit numbers as the upper halves of two vectors, and back from lower halves with the sign extended. x86
// does so within each 128 bits: those of the two then alternate in memory, and `in_order` has them one after the other.
#if defined(__AVX512F__)
ELBO_INLINE Two<Bits32V> unpacked(TwiceV v) {
  const __m512i bits = bits_as<__m512i>(v), zero = _mm512_setzero_si512();
  return {bits_as<Bits32V>(_mm512_unpacklo_epi16(zero, bits)), bits_as<Bits32V>(_mm512_unpackhi_epi16(zero, bits))};
}

ELBO_INLINE TwiceV packed(IntV first, IntV second) {
  return bits_as<TwiceV>(_mm512_packs_epi32(bits_as<__m512i>(first), bits_as<__m512i>(second)));
}

ELBO_INLINE Two<FloatV> in_order(Two<FloatV> v) {
  const __m512 a = bits_as<__m512>(v.first), b = bits_as<__m512>(v.second);
  const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return {bits_as<FloatV>(_mm512_permutex2var_pd(x, lower, y)), bits_as<FloatV>(_mm512_permutex2var_pd(x, upper, y))};
}
#elif defined(__AVX2__)
ELBO_INLINE Two<Bits32V> unpacked(TwiceV v) {
  const __m256i bits = bits_as<__m256i>(v), zero = _mm256_setzero_si256();
  return {bits_as<Bits32V>(_mm256_unpacklo_epi16(zero, bits)), bits_as<Bits32V>(_mm256_unpackhi_epi16(zero, bits))};
}

ELBO_INLINE TwiceV packed(IntV first, IntV second) {
  return bits_as<TwiceV>(_mm256_packs_epi32(bits_as<__m256i>(first), bits_as<__m256i>(second)));
}

ELBO_INLINE Two<FloatV> in_order(Two<FloatV> v) {
  const __m256 a = bits_as<__m256>(v.first), b = bits_as<__m256>(v.second);
  return {bits_as<FloatV>(_mm256_permute2f128_ps(a, b, 0x20)), bits_as<FloatV>(_mm256_permute2f128_ps(a, b, 0x31))};
}
#elif defined(__SSE2__)
ELBO_INLINE Two<Bits32V> unpacked(TwiceV v) {
  const __m128i bits = bits_as<__m128i>(v), zero = _mm_setzero_si128();
  return {bits_as<Bits32V>(_mm_unpacklo_epi16(zero, bits)), bits_as<Bits32V>(_mm_unpackhi_epi16(zero, bits))};
}

ELBO_INLINE TwiceV packed(IntV first, IntV second) {
  return bits_as<TwiceV>(_mm_packs_epi32(bits_as<__m128i>(first), bits_as<__m128i>(second)));
}

ELBO_INLINE Two<FloatV> in_order(Two<FloatV> v) {
  return v;
}
#else
ELBO_INLINE Two<Bits32V> unpacked(TwiceV v) {
  const auto both = bits_as<Two<Bits16V>>(v);
  return {__builtin_convertvector(both.first, Bits32V) << 16, __builtin_convertvector(both.second, Bits32V) << 16};
}

ELBO_INLINE TwiceV packed(IntV first, IntV second) {
  return bits_as<TwiceV>(
      Two<Bits16V>{__builtin_convertvector(first, Bits16V), __builtin_convertvector(second, Bits16V)});
}

ELBO_INLINE Two<FloatV> in_order(Two<FloatV> v) {
  return v;
}
#endif

// Converts by a format's arithmetic: widened(16-bit numbers in the upper halves), rounded(lanes) to lower halves.
template <class Format>
struct ByArithmetic {
  static ELBO_INLINE FloatV widened(Bits16V v) {
    return Format::widened(__builtin_convertvector(v, Bits32V) << 16);
  }

  static ELBO_INLINE Bits16V rounded(FloatV x) {
    return __builtin_convertvector(Format::rounded(x), Bits16V);
  }

  static ELBO_INLINE Two<FloatV> widened(TwiceV v) {
    const Two<Bits32V> upper = unpacked(v);
    return {Format::widened(upper.first), Format::widened(upper.second)};
  }

  static ELBO_INLINE TwiceV rounded(Two<FloatV> x) {
    return packed(Format::rounded(x.first), Format::rounded(x.second));
  }

  static ELBO_INLINE Two<FloatV> in_order(Two<FloatV> v) {
    return elbo::in_order(v);
  }
};

struct BFloat16Format {
  static ELBO_INLINE FloatV widened(Bits32V upper) {
    return bits_as<FloatV>(upper);
  }

  static ELBO_INLINE IntV rounded(FloatV x) {
    const Bits32V f = bits_as<Bits32V>(x);
    const IntV number = bits_as<IntV>(f + 0x7FFF + (f >> 16 & 1)) >> 16;
    return x == x ? number : IntV{} + 0x7FC0;
  }
};

// A subnormal number is what its sum with 2⁻¹⁴, or with ½, has in the last bits. So no result on the way is a subnormal
// float, which would be slow, and 0 where PyTorch flushes them.
struct HalfFormat {
  static constexpr int32_t one = 1 << 23;                             // of a float's exponent
  static constexpr int32_t least = 113 * one, too_large = 143 * one;  // 2⁻¹⁴, the least normal number, and 2¹⁶

  static ELBO_INLINE FloatV widened(Bits32V upper) {
    const IntV magnitude = bits_as<IntV>(upper & 0x7FFFFFFF) >> 3;
    const IntV normal = magnitude + 112 * one;
    const IntV subnormal = bits_as<IntV>(bits_as<FloatV>(magnitude + least) - 0x1p-14f);
    const IntV finite = magnitude < one ? subnormal : normal;
    const IntV number = magnitude < 31 * one ? finite : normal + 112 * one;  // infinity, NaN
    return bits_as<FloatV>(number | bits_as<IntV>(upper & 0x80000000));
  }

  static ELBO_INLINE IntV rounded(FloatV x) {
    const Bits32V f = bits_as<Bits32V>(x);
    const IntV magnitude = bits_as<IntV>(f & 0x7FFFFFFF);
    const IntV normal = (magnitude - 112 * one + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    const IntV subnormal = bits_as<IntV>(bits_as<FloatV>(magnitude) + 0.5f) - 126 * one;
    const IntV finite = magnitude < least ? subnormal : normal;
    const IntV number = magnitude < too_large ? finite : IntV{} + 0x7C00;
    return (x == x ? number : IntV{} + 0x7E00) | bits_as<IntV>(f & 0x80000000) >> 16;
  }
};

#if defined(__F16C__) && defined(__AVX2__)
// Instructions do it.
struct HalfConversion {
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

  static ELBO_INLINE FloatV widened(Bits16V v) {
#if defined(__AVX512F__)
    return bits_as<FloatV>(_mm512_cvtph_ps(bits_as<__m256i>(v)));
#else
    return bits_as<FloatV>(_mm256_cvtph_ps(bits_as<__m128i>(v)));
#endif
  }

  static ELBO_INLINE Bits16V rounded(FloatV x) {
#if defined(__AVX512F__)
    return bits_as<Bits16V>(_mm512_cvtps_ph(bits_as<__m512>(x), kNearest));
#else
    return bits_as<Bits16V>(_mm256_cvtps_ph(bits_as<__m256>(x), kNearest));
#endif
  }

  static ELBO_INLINE Two<FloatV> widened(TwiceV v) {
    const auto both = bits_as<Two<Bits16V>>(v);
    return {widened(both.first), widened(both.second)};
  }

  static ELBO_INLINE TwiceV rounded(Two<FloatV> x) {
    const Bits16V first = rounded(x.first), second = rounded(x.second);  // joined by hand, or they would go by memory
#if defined(__AVX512F__)
    const __m512i lower = _mm512_castsi256_si512(bits_as<__m256i>(first));
    return bits_as<TwiceV>(_mm512_inserti64x4(lower, bits_as<__m256i>(second), 1));
#else
    return bits_as<TwiceV>(_mm256_set_m128i(bits_as<__m128i>(second), bits_as<__m128i>(first)));
#endif
  }

  static ELBO_INLINE Two<FloatV> in_order(Two<FloatV> v) {
    return v;
  }
};
#else
using HalfConversion = ByArithmetic<HalfFormat>;
#endif

}  // namespace elbo
