// Tensors of every dtype, seen by the element loops as blocks of the compute type A (float or double).
//
// A block of A is used where it lies. A block of another dtype is converted into a scratch buffer small enough to stay
// in the first-level cache, so each loop is written, and compiled, once for float and once for double.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../span.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace elbo {

constexpr int64_t kBlock = 1024;  // elements converted at a time

template <class T, class A>
inline void convert(const T* __restrict in, A* __restrict out, int64_t n) {
  using Via = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<A, double>, double, float>;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(static_cast<Via>(in[i]));
}

#if defined(__F16C__)
// The compiler does not vectorise Half's conversions; these instructions give the same bits.
inline void convert(const Half* __restrict in, float* __restrict out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

inline void convert(const float* __restrict in, Half* __restrict out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
  }
  for (; i < n; ++i) out[i] = static_cast<Half>(in[i]);
}
#endif

template <class A>
constexpr ScalarType kDtype = std::is_same_v<A, float> ? ScalarType::Float : ScalarType::Double;

template <class A>
inline const A* read(const Span& span, int64_t sample, int64_t element, int64_t n, A* scratch) {
  const char* p = span.at(sample, element);
  if (span.dtype == kDtype<A>) return reinterpret_cast<const A*>(p);
  with_type(span.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    convert(reinterpret_cast<const T*>(p), scratch, n);
  });
  return scratch;
}

// Where a loop may write a block, and afterwards, where that was scratch, the conversion into the tensor.
template <class A>
inline A* write_to(const Span& span, int64_t sample, int64_t element, A* scratch) {
  return span.dtype == kDtype<A> ? reinterpret_cast<A*>(span.at(sample, element)) : scratch;
}

template <class A>
inline void written(const Span& span, int64_t sample, int64_t element, int64_t n, const A* scratch) {
  if (span.dtype == kDtype<A>) return;
  with_type(span.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    convert(scratch, reinterpret_cast<T*>(span.at(sample, element)), n);
  });
}

}  // namespace elbo
