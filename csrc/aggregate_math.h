// The formulas of the aggregate posterior, beside elbo_math.h and for the same targets.
#pragma once

#include "elbo_math.h"

namespace elbo {

// N(μ, exp l) of one dimension, as the loops take it: what needs an exp is known before them.
template <class V>
struct Component {
  V mu, precision, constant;
};

template <class V>
ELBO_INLINE Component<V> component(V mu, V logvar) {
  constexpr double log_2pi = 1.83787706640934548356;
  using A = Scalar<V>;
  return {mu, Lanes<V>::exp(-logvar), A(-0.5) * (logvar + A(log_2pi))};
}

// log N(z; μ, exp l). In this form, and not multiplied out, since z² − 2zμ + μ² cancels.
template <class V>
ELBO_INLINE V log_normal(V z, const Component<V>& of) {
  const V d = z - of.mu;
  return of.constant - Scalar<V>(0.5) * d * (d * of.precision);
}

template <class V>
struct LogNormalGrad {
  V log_normal, mu, logvar;  // ∂/∂z is −∂/∂μ
};

// w · ∂ log N(z; μ, exp l)/∂(…) is w times these.
template <class V>
ELBO_INLINE LogNormalGrad<V> log_normal_grad(V z, const Component<V>& of) {
  using A = Scalar<V>;
  const V d = z - of.mu, scaled = d * of.precision;
  return {of.constant - A(0.5) * d * scaled, scaled, A(0.5) * (scaled * d - A(1))};
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
