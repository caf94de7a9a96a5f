// What the kernels of the aggregate posterior are told of a call, without tensors: aggregate.h makes these structures.
#pragma once

#include "aggregate_math.h"
#include "span.h"

namespace elbo {

// A matrix in memory, of any strides.
struct Matrix {
  Span span;  // of its first row; batch_stride: between rows
  int64_t rows = 0, columns = 0, stride = 1;

  ELBO_INLINE explicit operator bool() const {
    return span.base != nullptr;
  }
};

struct MixtureOf {
  Matrix z, mu, logvar;
  int64_t own;
  MixtureWeights log_weights;
};

// The sums, and their gradients, which may be absent.
struct SumsGiven {
  Matrix joint, marginals, grad_joint, grad_marginals;
};

// Those that are wanted.
struct MixtureGradients {
  Matrix z, mu, logvar;
};

}  // namespace elbo
