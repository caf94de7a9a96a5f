// Tensors of every dtype, seen by the element loops as blocks of the compute type A (float or double).
//
// A block of A is used where it lies. A block of another dtype is converted into a scratch buffer small enough to stay
// in the first-level cache, so each loop is written, and compiled, once for float and once for double.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../span.h"
#include "stored.h"

namespace elbo {

constexpr int64_t kBlock = 1024;  // elements converted at a time

template <class T, class U>
inline void convert(const T* __restrict in, U* __restrict out, int64_t n) {
  if constexpr (std::is_same_v<T, uint8_t> && std::is_same_v<U, float>) {
    for_lanes<float>(n, [&](int64_t i, auto lanes) { store(out + i, load(in + i, lanes), lanes); });
  } else if constexpr (std::is_same_v<T, uint8_t> || std::is_same_v<U, uint8_t>) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<U>(in[i]);
  } else if constexpr (std::is_same_v<Computed<T>, Computed<U>>) {
    for_lanes<Computed<T>>(n, [&](int64_t i, auto lanes) { store(out + i, load(in + i, lanes), lanes); });
  } else if constexpr (kIsHalf<T>) {  // between fp64 and 16 bits by way of fp32, as PyTorch does
    for_lanes<float>(n, [&](int64_t i, auto lanes) {
      float via[kLanes<float>];
      store(via, load(in + i, lanes), lanes);
      for (int64_t k = 0; k < lanes; ++k) out[i + k] = via[k];
    });
  } else if constexpr (kIsHalf<U>) {
    for_lanes<float>(n, [&](int64_t i, auto lanes) {
      float via[kLanes<float>];
      for (int64_t k = 0; k < lanes; ++k) via[k] = static_cast<float>(in[i + k]);
      store(out + i, load(via, lanes), lanes);
    });
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<U>(in[i]);
  }
}

template <class T>
constexpr ScalarType kDtype = std::is_same_v<T, float>      ? ScalarType::Float
                              : std::is_same_v<T, double>   ? ScalarType::Double
                              : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                              : std::is_same_v<T, uint8_t>  ? ScalarType::Byte
                                                            : ScalarType::Half;

template <class T>
ELBO_INLINE T* as(const Span& span, int64_t sample, int64_t element) {
  return reinterpret_cast<T*>(span.at(sample, element));
}

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

// Numbers that lie one after the other, into a tensor that does too.
inline void convert_to(const Span& span, const double* values, int64_t n) {
  if (span.dtype == ScalarType::Double) {
    std::copy_n(values, n, reinterpret_cast<double*>(span.base));
  } else {
    written(span, 0, 0, n, values);
  }
}

}  // namespace elbo
