// What the kernels see of a tensor: where its samples lie and what they are made of.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "elbo_math.h"

namespace elbo {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// A batch of samples, each a dense block of elements.
struct Span {
  char* base = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t itemsize = 4;
  int64_t batch_stride = 0;  // in elements

  ELBO_INLINE char* at(int64_t sample, int64_t element) const {
    return base + (sample * batch_stride + element) * itemsize;
  }
};

// Calls f with a null pointer of the C++ type of a floating dtype.
template <class F>
ELBO_INLINE void with_floating(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Double:
      return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<Half*>(nullptr));
  }
}

// The same where there are bytes too.
template <class F>
ELBO_INLINE void with_type(ScalarType dtype, F f) {
  const bool is_byte = dtype == ScalarType::Byte || dtype == ScalarType::Bool;
  is_byte ? f(static_cast<uint8_t*>(nullptr)) : with_floating(dtype, f);
}

}  // namespace elbo
