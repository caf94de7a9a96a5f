// Numbers as they lie in memory, and the lanes that are computed with: floats from fp32, bf16 and fp16, doubles from
// fp64. 16-bit numbers are converted in registers, by vector instructions on every instruction set, and rounded as
// PyTorch rounds them: to the nearest, ties to even.
#pragma once

#include "../span.h"
#include "simd.h"

namespace elbo {

typedef uint16_t Bits16V __attribute__((vector_size(kVectorBytes / 2)));  // as many as there are float lanes
typedef uint32_t Bits32V __attribute__((vector_size(kVectorBytes)));

template <class To, class From>
ELBO_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// What is computed with where numbers of type T are stored.
template <class T>
using Computed = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Stored {
  using Bits = Vector<T>;

  static ELBO_INLINE Vector<T> widened(Bits v) {
    return v;
  }

  static ELBO_INLINE Bits rounded(Vector<T> v) {
    return v;
  }
};

template <>
struct Stored<BFloat16> {
  using Bits = Bits16V;

  static ELBO_INLINE FloatV widened(Bits v) {
    return bits_as<FloatV>(__builtin_convertvector(v, Bits32V) << 16);
  }

  static ELBO_INLINE Bits rounded(FloatV x) {
    const Bits32V f = bits_as<Bits32V>(x);
    const Bits32V number = (f + 0x7FFF + (f >> 16 & 1)) >> 16;
    return __builtin_convertvector(x == x ? number : Bits32V{} + 0x7FC0, Bits);
  }
};

template <>
struct Stored<Half> {
  using Bits = Bits16V;

#if defined(__AVX512F__)
  static ELBO_INLINE FloatV widened(Bits v) {
    return bits_as<FloatV>(_mm512_cvtph_ps(bits_as<__m256i>(v)));
  }

  static ELBO_INLINE Bits rounded(FloatV x) {
    return bits_as<Bits>(_mm512_cvtps_ph(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__AVX2__) && defined(__F16C__)
  static ELBO_INLINE FloatV widened(Bits v) {
    return bits_as<FloatV>(_mm256_cvtph_ps(bits_as<__m128i>(v)));
  }

  static ELBO_INLINE Bits rounded(FloatV x) {
    return bits_as<Bits>(_mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static constexpr uint32_t kOne = 1 << 23;          // of a float's exponent
  static constexpr uint32_t kLeast = 113 * kOne;     // 2⁻¹⁴, the least normal number
  static constexpr uint32_t kTooLarge = 143 * kOne;  // 2¹⁶

  // A subnormal number is what its sum with 2⁻¹⁴ (or ½) has in the last bits: so none of the floats is subnormal, which
  // would be slow, or 0 where PyTorch flushes them.
  static ELBO_INLINE FloatV widened(Bits v) {
    const Bits32V h = __builtin_convertvector(v, Bits32V);
    const Bits32V magnitude = (h & 0x7FFF) << 13;
    const IntV exponent = bits_as<IntV>(magnitude >> 23);
    const Bits32V normal = magnitude + 112 * kOne;
    const Bits32V subnormal = bits_as<Bits32V>(bits_as<FloatV>(magnitude + kLeast) - 0x1p-14f);
    const Bits32V number = exponent > 0 ? normal : subnormal;
    return bits_as<FloatV>((exponent > 30 ? normal + 112 * kOne : number) | (h & 0x8000) << 16);
  }

  static ELBO_INLINE Bits rounded(FloatV x) {
    const Bits32V f = bits_as<Bits32V>(x), magnitude = f & 0x7FFFFFFF;
    const IntV size = bits_as<IntV>(magnitude);  // signed, as SSE2 compares
    const Bits32V normal = (magnitude - 112 * kOne + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    const Bits32V subnormal = bits_as<Bits32V>(bits_as<FloatV>(magnitude) + 0.5f) - 126 * kOne;
    const Bits32V small = size < static_cast<int32_t>(kLeast) ? subnormal : normal;
    const Bits32V number = size < static_cast<int32_t>(kTooLarge) ? small : Bits32V{} + 0x7C00;
    return __builtin_convertvector((x == x ? number : Bits32V{} + 0x7E00) | (f >> 16 & 0x8000), Bits);
  }
#endif
};

// The first `lanes` lanes from memory, the others 0.
template <class T>
ELBO_INLINE Vector<Computed<T>> load(const T* p, int64_t lanes) {
  typename Stored<T>::Bits bits{};
  std::memcpy(&bits, p, lanes * sizeof(T));
  return Stored<T>::widened(bits);
}

template <class T>
ELBO_INLINE void store(T* p, Vector<Computed<T>> v, int64_t lanes) {
  const typename Stored<T>::Bits bits = Stored<T>::rounded(v);
  std::memcpy(p, &bits, lanes * sizeof(T));
}

// The bytes of a vector as T stores it, to a multiple of which `stream` may write.
template <class T>
constexpr int64_t kStoredBytes = sizeof(typename Stored<T>::Bits);

// Stores a vector past the caches: what is written so is not read from memory first. Others are sure to see it after
// `streamed()`.
template <class T>
ELBO_INLINE void stream(T* p, Vector<Computed<T>> v) {
  const typename Stored<T>::Bits bits = Stored<T>::rounded(v);
#if defined(__AVX512F__)
  if constexpr (sizeof bits == 64) return _mm512_stream_ps(reinterpret_cast<float*>(p), bits_as<__m512>(bits));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof bits == 32) return _mm256_stream_ps(reinterpret_cast<float*>(p), bits_as<__m256>(bits));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof bits == 16) return _mm_stream_ps(reinterpret_cast<float*>(p), bits_as<__m128>(bits));
#endif
#if defined(__SSE2__) && defined(__x86_64__)
  if constexpr (sizeof bits == 8) {
    return _mm_stream_si64(reinterpret_cast<long long*>(p), bits_as<long long>(bits));
  }
#endif
  std::memcpy(p, &bits, sizeof bits);
}

ELBO_INLINE void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace elbo
