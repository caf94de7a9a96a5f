// Numbers as they lie in memory, and the lanes that are computed with: floats for fp32, bf16 and fp16, doubles for
// fp64.
#pragma once

#include "half.h"

namespace elbo {

// What is computed with where numbers of type T are stored.
template <class T>
using Computed = std::conditional_t<std::is_same_v<T, double>, double, float>;

typedef uint8_t BytesV __attribute__((vector_size(kLanes<float>)));

// In one or two instructions: GCC takes __builtin_convertvector of so few bytes apart.
ELBO_INLINE IntV widened(BytesV bytes) {
#if defined(__AVX512F__)
  return bits_as<IntV>(_mm512_cvtepu8_epi32(bits_as<__m128i>(bytes)));
#elif defined(__AVX2__)
  return bits_as<IntV>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_as<int64_t>(bytes))));
#elif defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128(), four = _mm_cvtsi32_si128(bits_as<int32_t>(bytes));
  return bits_as<IntV>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(four, zero), zero));
#else
  return __builtin_convertvector(bytes, IntV);
#endif
}

// Bytes are only read.
ELBO_INLINE FloatV load(const uint8_t* p, int64_t lanes) {
  BytesV bytes{};
  std::memcpy(&bytes, p, lanes);
  return __builtin_convertvector(widened(bytes), FloatV);
}

template <class T>
using Conversion = std::conditional_t<std::is_same_v<T, BFloat16>, ByArithmetic<BFloat16Format>, HalfConversion>;

template <class T>
constexpr bool kIsHalf = sizeof(T) == 2;

// The first `lanes` lanes from memory, the others 0.
template <class T>
ELBO_INLINE Vector<Computed<T>> load(const T* p, int64_t lanes) {
  std::conditional_t<kIsHalf<T>, Bits16V, Vector<Computed<T>>> bits{};
  std::memcpy(&bits, p, lanes * sizeof(T));
  if constexpr (kIsHalf<T>) {
    return Conversion<T>::widened(bits);
  } else {
    return bits;
  }
}

template <class T>
ELBO_INLINE void store(T* p, Vector<Computed<T>> v, int64_t lanes) {
  if constexpr (kIsHalf<T>) {
    const Bits16V bits = Conversion<T>::rounded(v);
    std::memcpy(p, &bits, lanes * sizeof(T));
  } else {
    std::memcpy(p, &v, lanes * sizeof(T));
  }
}

ELBO_INLINE Four<FloatV> load(const float* p, FourVectors) {
  constexpr AllLanes<float> all;
  return {load(p, all), load(p + all, all), load(p + 2 * all, all), load(p + 3 * all, all)};
}

ELBO_INLINE void store(float* p, const Four<FloatV>& v, FourVectors) {
  constexpr AllLanes<float> all;
  ELBO_UNROLL
  for (int k = 0; k < 4; ++k) store(p + k * all, v.of[k], all);
}

// Stores a vector past the caches, to a multiple of its size: what is written so is not read from memory first. Others
// are sure to see it after `streamed()`.
template <class V>
ELBO_INLINE void stream_bits(void* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), bits_as<__m512>(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), bits_as<__m256>(v));
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(p), bits_as<__m128>(v));
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

template <class A>
ELBO_INLINE void stream(A* p, Vector<A> v) {
  stream_bits(p, v);
}

ELBO_INLINE void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Two vectors of lanes at once, which 16-bit numbers are fastest for. Which number is in which lane is left to the
// instructions: what is computed goes back by `store_two`, or by `in_order`.
template <class T>
ELBO_INLINE Two<Vector<Computed<T>>> load_two(const T* p) {
  constexpr int64_t L = kLanes<Computed<T>>;
  if constexpr (kIsHalf<T>) {
    TwiceV bits;
    std::memcpy(&bits, p, sizeof bits);
    return Conversion<T>::widened(bits);
  } else {
    return {load(p, AllLanes<T>{}), load(p + L, AllLanes<T>{})};
  }
}

template <bool PastCaches, class T>
ELBO_INLINE void store_two(T* p, Two<Vector<Computed<T>>> v) {
  const auto put = [](T* at, auto bits) {
    if constexpr (PastCaches) {
      stream_bits(at, bits);
    } else {
      std::memcpy(at, &bits, sizeof bits);
    }
  };
  if constexpr (kIsHalf<T>) {
    put(p, Conversion<T>::rounded(v));
  } else {
    put(p, v.first);
    put(p + kLanes<T>, v.second);
  }
}

// The lanes of T's `load_two` in the order of memory.
template <class T, class V>
ELBO_INLINE Two<V> in_order(Two<V> v) {
  if constexpr (kIsHalf<T>) {
    return Conversion<T>::in_order(v);
  } else {
    return v;
  }
}

}  // namespace elbo
