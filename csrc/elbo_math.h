// The formulas, once, for every C++ target: scalars on host and device, vectors of lanes on the host.
//
// V is float, double, or a GCC/Clang vector of them; Lanes<V> says what its scalar is and how it takes exp. Written
// without branches, so that one text serves a lane, a thread and a vector. Compile with -ffp-contract=off: then every
// instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ELBO_INLINE __host__ __device__ __forceinline__
#define ELBO_UNROLL _Pragma("unroll")
#else
#define ELBO_INLINE inline __attribute__((always_inline))
#define ELBO_UNROLL _Pragma("GCC unroll 16")
#endif

namespace elbo {

template <class V>
struct Lanes;

template <>
struct Lanes<float> {
  using Scalar = float;
  static ELBO_INLINE float exp(float x) {
    return ::expf(x);
  }
};

template <>
struct Lanes<double> {
  using Scalar = double;
  static ELBO_INLINE double exp(double x) {
    return ::exp(x);
  }
};

template <class V>
using Scalar = typename Lanes<V>::Scalar;

// ------------------------------------------------------------------------------------------------------- the rate

// 1 + t/3 (1 + t/4 (1 + …)), so that exp(t) − 1 − t = t²/2 · series. Exact to rounding for |t| < ½.
template <class V>
ELBO_INLINE V expm1mx_series(V t) {
  using A = Scalar<V>;
  constexpr int last = sizeof(A) == 4 ? 9 : 18;
  V series = V{} + A(1);
  ELBO_UNROLL
  for (int n = last; n > 2; --n) series = A(1) + series * t * (A(1) / A(n));
  return series;
}

template <class V>
ELBO_INLINE auto is_small(V t) {
  using A = Scalar<V>;
  return (t < A(0.5)) & (t > A(-0.5));
}

// exp(t) − 1 − t. Near 0 it is t²/2, where the literal formula, and expm1(t) − t too, has cancelled.
template <class V>
ELBO_INLINE V expm1mx(V t) {
  using A = Scalar<V>;
  const V near = A(0.5) * t * t * expm1mx_series(t);
  const V far = Lanes<V>::exp(t) - A(1) - t;
  return is_small(t) ? near : far;
}

// exp(t) − 1
template <class V>
ELBO_INLINE V expm1(V t) {
  using A = Scalar<V>;
  const V near = t + A(0.5) * t * t * expm1mx_series(t);
  const V far = Lanes<V>::exp(t) - A(1);
  return is_small(t) ? near : far;
}

// exp(a) beside expm1(b) or expm1mx(b)
template <class V>
struct ExpAnd {
  V exp, other;
};

template <class V>
ELBO_INLINE ExpAnd<V> exp_and_expm1(V a, V b) {
  return {Lanes<V>::exp(a), expm1(b)};
}

template <class V>
ELBO_INLINE ExpAnd<V> exp_and_expm1mx(V a, V b) {
  return {Lanes<V>::exp(a), expm1mx(b)};
}

// KL(N(μ, exp l) ‖ N(0, 1)) of one element
template <class V>
ELBO_INLINE V kl(V mu, V logvar) {
  return Scalar<V>(0.5) * (mu * mu + expm1mx(logvar));
}

// KL(N(μ, exp l) ‖ N(μ_p, exp l_p)) of one element
template <class V>
ELBO_INLINE V kl(V mu, V logvar, V prior_mu, V prior_logvar) {
  const V d = mu - prior_mu;
  const auto [precision, far] = exp_and_expm1mx<V>(-prior_logvar, logvar - prior_logvar);
  return Scalar<V>(0.5) * (d * d * precision + far);
}

template <class V>
struct KlGrad {
  V mu, logvar, prior_mu, prior_logvar;
};

// b · ∂KL/∂(…)
template <class V>
ELBO_INLINE KlGrad<V> kl_grad(V b, V mu, V logvar) {
  return {b * mu, b * Scalar<V>(0.5) * expm1(logvar), V{}, V{}};
}

template <class V>
ELBO_INLINE KlGrad<V> kl_grad(V b, V mu, V logvar, V prior_mu, V prior_logvar) {
  using A = Scalar<V>;
  const V d = mu - prior_mu;
  const auto [precision, expm1_dlogvar] = exp_and_expm1<V>(-prior_logvar, logvar - prior_logvar);
  const V dkl_dmu = d * precision;
  return {b * dkl_dmu, b * A(0.5) * expm1_dlogvar, -(b * dkl_dmu), A(-0.5) * b * (expm1_dlogvar + dkl_dmu * d)};
}

// ------------------------------------------------------------------------------------ distortion, σ inside a sample

template <class V>
ELBO_INLINE V difference(V recon, V target) {
  return recon - target;
}

// e²/σ² + 2 log σ: twice the distortion of one element, less log 2π
template <class V>
ELBO_INLINE V scaled_error(V e, V log_sigma) {
  using A = Scalar<V>;
  return e * e * Lanes<V>::exp(A(-2) * log_sigma) + A(2) * log_sigma;
}

template <class V>
struct DistortionGrad {
  V recon, log_sigma;
};

template <class V>
ELBO_INLINE DistortionGrad<V> distortion_grad(V w, V e, V log_sigma) {
  using A = Scalar<V>;
  const V scaled = e * Lanes<V>::exp(A(-2) * log_sigma);
  return {w * scaled, w * (A(1) - e * scaled)};
}

// ------------------------------------------------------------------------------------------ O(B): the σ of a group

// As in fused_elbo/sigma.py and fused_elbo/reference/math.py.
enum SigmaMode : int64_t { kGiven, kBatch, kImage, kElement };
enum Reduction : int64_t { kBatchMean, kSum, kMean, kNone };

struct Sigma {
  double log_sigma;
  double inverse_variance;
  double slope;  // ∂ log σ / ∂ ½ log MSE: 1 above the floor, 0 below it, a sigmoid with softclip
};

ELBO_INLINE Sigma given_sigma(double log_sigma) {
  return {log_sigma, ::exp(-2.0 * log_sigma), 0.0};
}

// σ² = MSE = total/n, bounded from below. NaN passes: a floor that hid it would hide a diverged model.
ELBO_INLINE Sigma optimal_sigma(double total, double n, double min_log_sigma, bool softclip) {
  const double mse = total / n;
  if (softclip) {
    if (mse == 0.0) return {min_log_sigma, ::exp(-2.0 * min_log_sigma), 0.0};
    const double x = 0.5 * ::log(mse) - min_log_sigma;
    const double log_sigma = min_log_sigma + (x > 0.0 ? x : 0.0) + ::log1p(::exp(x > 0.0 ? -x : x));
    return {log_sigma, ::exp(-2.0 * log_sigma), 1.0 / (1.0 + ::exp(-x))};
  }
  const double floor = ::exp(2.0 * min_log_sigma);
  const double variance = mse <= floor ? floor : mse;
  return {0.5 * ::log(variance), 1.0 / variance, mse > floor ? 1.0 : 0.0};
}

constexpr double kHalfLog2Pi = 0.91893853320467274178;

// −log p of a sample from its sum of squares
ELBO_INLINE double distortion(double s, double dims, const Sigma& sigma) {
  return 0.5 * s * sigma.inverse_variance + dims * (sigma.log_sigma + kHalfLog2Pi);
}

// The same where σ varies inside a sample: s is then Σ scaled_error, with every σ in it already.
ELBO_INLINE double distortion(double s, double dims) {
  return 0.5 * s + dims * kHalfLog2Pi;
}

// ∂ distortion / ∂ log σ
ELBO_INLINE double distortion_slope(double s, double dims, double inverse_variance) {
  return dims - s * inverse_variance;
}

// What a sample's distortion and rate are multiplied by before they are summed.
ELBO_INLINE double reduction_weight(int64_t reduction, double batch, double dims) {
  return reduction == kBatchMean ? 1 / batch : reduction == kMean ? 1 / (batch * dims) : 1;
}

// ----------------------------------------------------------------------------------- O(B): the gradients' factors

// ∂L/∂(loss_i, distortion_i, rate_i), times the reduction's weight
struct Weight {
  double loss, distortion, rate;
};

// What a sample's elements are multiplied by, and its part of the gradients that are O(B) themselves.
struct Factors {
  double recon_scale;      // a_i, less the term of a σ that the batch shares; w_i where σ varies inside
  double grad_kl_clamped;  // the part of b_i that reaches the elements which free_bits lets through
  double grad_kl;          // the part that reaches all of them
  double log_sigma;        // w_i (D − S_i/σ²)
  double beta;
};

ELBO_INLINE Factors
factors(int64_t mode, const Sigma& sigma, double s, double kl_clamped, double dims, double beta, const Weight& weight) {
  const double w = weight.loss + weight.distortion;
  Factors f = {w, weight.loss * beta, weight.rate, 0.0, weight.loss * kl_clamped};
  if (mode == kElement) return f;
  f.recon_scale = w * sigma.inverse_variance;
  f.log_sigma = w * distortion_slope(s, dims, sigma.inverse_variance);
  if (mode == kImage && s != 0) f.recon_scale += sigma.slope * f.log_sigma / s;
  return f;
}

// What a capacity adds to the loss: weight is the reduction's, gap = mean_i KL_i − C.
ELBO_INLINE double capacity_penalty(double weight, double batch, double beta, double gap) {
  return weight * batch * beta * ::fabs(gap);
}

// The same factors under a capacity: β multiplies |gap|.
ELBO_INLINE void limit_by_capacity(Factors& f, const Weight& weight, double gap) {
  f.grad_kl_clamped *= (gap > 0) - (gap < 0);
  f.beta = weight.loss * ::fabs(gap);
}

// What reaches every error of the batch through the σ that it shares: slope_sum = Σ_j w_j (D − S_j/σ²).
ELBO_INLINE double shared_sigma_term(const Sigma& sigma, double slope_sum, double total) {
  return total == 0 ? 0.0 : sigma.slope * slope_sum / total;
}

}  // namespace elbo
