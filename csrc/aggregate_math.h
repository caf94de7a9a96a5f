// The formulas of the aggregate posterior, beside elbo_math.h and for the same targets.
#pragma once

#include "elbo_math.h"

namespace elbo {

// N(μ, exp l) of one dimension, as the loops take it: what needs an exp is known before them.
template <class V>
struct Component {
  V mu, half_precision, constant;
};

template <class V>
ELBO_INLINE Component<V> component(V mu, V logvar) {
  constexpr double log_2pi = 1.83787706640934548356;
  using A = Scalar<V>;
  return {mu, A(0.5) * Lanes<V>::exp(-logvar), A(-0.5) * (logvar + A(log_2pi))};
}

template <class V>
struct LogNormalGrad {
  V log_normal, half_mu, logvar;  // ∂/∂μ is twice the second, and ∂/∂z its negative
};

// log N(z; μ, exp l) and its derivatives. In this form, and not multiplied out, since z² − 2zμ + μ² cancels.
template <class V>
ELBO_INLINE LogNormalGrad<V> log_normal_grad(V z, const Component<V>& of) {
  const V d = z - of.mu, half_scaled = d * of.half_precision, half_square = d * half_scaled;
  return {of.constant - half_square, half_scaled, half_square - Scalar<V>(0.5)};
}

template <class V>
ELBO_INLINE V log_normal(V z, const Component<V>& of) {
  return log_normal_grad(z, of).log_normal;
}

// log w of the component that a z was drawn from, and of each other one.
struct MixtureWeights {
  double own, others;
};

// 1/N and (N − 1)/(N (M − 1)), so that the other M − 1 stand for the other N − 1 of the data set.
inline MixtureWeights mixture_log_weights(double components, double dataset_size) {
  const double of_own = -std::log(dataset_size);
  if (components == 1) return {of_own, of_own};
  return {of_own, std::log((dataset_size - 1) / (dataset_size * (components - 1)))};
}

}  // namespace elbo
