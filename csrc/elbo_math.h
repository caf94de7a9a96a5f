// The formulas, once, for every C++ target: scalars on host and device, vectors of lanes on the host.
//
// V is float, double, a GCC/Clang vector of them, or several vectors; Lanes<V> says what its scalar is and how it takes
// exp. Written without branches, so that one text serves a lane, a thread and a vector. Compile with -ffp-contract=off:
// then every instruction set gives the same bits.
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

// Lane by lane `a` where the condition holds, else `b`.
template <class Condition, class V>
ELBO_INLINE V select(Condition condition, V a, V b) {
  return condition ? a : b;
}

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

// l within [least, most]. NaN passes.
template <class V>
ELBO_INLINE V clamped(V logvar, Scalar<V> least, Scalar<V> most) {
  const V above = select(logvar < least, V{} + least, logvar);
  return select(above > most, V{} + most, above);
}

// The gradient of l, from that of the clamped one: 0 outside, and NaN where l is NaN.
template <class V>
ELBO_INLINE V clamped_grad(V of_logvar, V logvar, Scalar<V> least, Scalar<V> most) {
  return select((logvar < least) | (logvar > most), V{}, of_logvar);
}

// ------------------------------------------------------------------------------------------- errors, σ inside a sample

// As in fused_elbo/likelihood.py.
enum Activation : int64_t { kNoActivation, kSigmoid, kTanh };

template <class V>
ELBO_INLINE V difference(V recon, V target) {
  return recon - target;
}

template <class V>
ELBO_INLINE V magnitude(V x) {
  return select(x < Scalar<V>(0), -x, x);
}

// |e|^q
template <int Q, class V>
ELBO_INLINE V power(V e) {
  if constexpr (Q == 2) {
    return e * e;
  } else {
    return magnitude(e);
  }
}

// ∂(|e|^q/q)/∂e: e, or its sign, which is 0 at 0, and NaN for NaN.
template <int Q, class V>
ELBO_INLINE V slope(V e) {
  using A = Scalar<V>;
  if constexpr (Q == 2) {
    return e;
  } else {
    const V not_above = select(e < A(0), V{} - A(1), e);
    return select(e > A(0), V{} + A(1), not_above);
  }
}

// Its product with a factor, where that is the same for many elements.
template <int Q, class V>
ELBO_INLINE V scaled_slope(V a, V e) {
  return a * slope<Q>(e);
}

// x̂ and ∂x̂/∂y of the decoder's last pre-activation y. Neither cancels anywhere.
template <class V>
struct Activated {
  V value, slope;
};

template <class V>
ELBO_INLINE Activated<V> sigmoid(V y) {
  using A = Scalar<V>;
  const V z = Lanes<V>::exp(-magnitude(y)), s = A(1) / (A(1) + z);
  return {select(y < A(0), z * s, s), z * s * s};
}

template <class V>
ELBO_INLINE Activated<V> hyperbolic_tangent(V y) {
  using A = Scalar<V>;
  const V w = expm1(A(-2) * magnitude(y)), s = A(1) / (w + A(2));
  const V t = w * s;
  return {select(y < A(0), t, -t), A(4) * (w + A(1)) * s * s};
}

// What a byte of the target stands for.
template <class V>
ELBO_INLINE V scaled_byte(V byte, Scalar<V> step, Scalar<V> low) {
  return byte * step + low;
}

// m f: 0 where the weight m is 0, whatever f is. NaN passes from m.
template <class V>
ELBO_INLINE V weighted(V m, V f) {
  return select(m == Scalar<V>(0), V{}, m * f);
}

// |e|^q/σ^q + q log σ: q times the distortion of one element, less the constant
template <int Q, class V>
ELBO_INLINE V scaled_error(V e, V log_sigma) {
  using A = Scalar<V>;
  return power<Q>(e) * Lanes<V>::exp(A(-Q) * log_sigma) + A(Q) * log_sigma;
}

template <class V>
struct DistortionGrad {
  V recon, log_sigma;
};

template <int Q, class V>
ELBO_INLINE DistortionGrad<V> distortion_grad(V w, V e, V log_sigma) {
  using A = Scalar<V>;
  const V scaled = slope<Q>(e) * Lanes<V>::exp(A(-Q) * log_sigma);
  return {w * scaled, w * (A(1) - e * scaled)};
}

// ------------------------------------------------------------------------------------------ O(B): the σ of a group

// As in fused_elbo/sigma.py, fused_elbo/rate.py and fused_elbo/call.py.
enum SigmaMode : int64_t { kGiven, kBatch, kImage, kElement };
enum LimitMode : int64_t { kNoLimit, kBatchCapacity, kSampleCapacity, kBatchFreeNats, kSampleFreeNats };
enum Reduction : int64_t { kBatchMean, kSum, kMean, kNone };

struct Sigma {
  double log_sigma;
  double inverse_scale;  // 1/σ^q
  double slope;          // ∂ log σ / ∂ (1/q) log mean: 1 above the floor, 0 below it, a sigmoid with softclip
};

ELBO_INLINE Sigma given_sigma(double log_sigma, double q) {
  return {log_sigma, ::exp(-q * log_sigma), 0.0};
}

// σ^q = total/n, the mean of |e|^q, bounded from below. NaN passes: a floor that hid it would hide a diverged model.
// Where nothing has a weight, the mean is 0.
ELBO_INLINE Sigma optimal_sigma(double total, double n, double min_log_sigma, bool softclip, double q) {
  const double mean = total / (n == 0.0 ? 1.0 : n);
  if (softclip) {
    if (mean == 0.0) return {min_log_sigma, ::exp(-q * min_log_sigma), 0.0};
    const double x = ::log(mean) / q - min_log_sigma;
    const double log_sigma = min_log_sigma + (x > 0.0 ? x : 0.0) + ::log1p(::exp(x > 0.0 ? -x : x));
    return {log_sigma, ::exp(-q * log_sigma), 1.0 / (1.0 + ::exp(-x))};
  }
  const double floor = ::exp(q * min_log_sigma);
  const double scale = mean <= floor ? floor : mean;
  return {::log(scale) / q, 1.0 / scale, mean > floor ? 1.0 : 0.0};
}

// What an element of error 0 costs where σ is 1.
ELBO_INLINE double nats_of_one(double q, bool constant) {
  constexpr double half_log_2pi = 0.91893853320467274178, log_2 = 0.69314718055994530942;
  return !constant ? 0.0 : q == 2 ? half_log_2pi : log_2;
}

// −log p of a sample from A, its sum of |e|^q
ELBO_INLINE double distortion(double a, double dims, const Sigma& sigma, double q, double of_one) {
  return a / q * sigma.inverse_scale + dims * (sigma.log_sigma + of_one);
}

// The same where σ varies inside a sample: A is then Σ scaled_error, with every σ in it already.
ELBO_INLINE double distortion(double a, double dims, double q, double of_one) {
  return a / q + dims * of_one;
}

// ∂ distortion / ∂ log σ
ELBO_INLINE double distortion_slope(double a, double dims, double inverse_scale) {
  return dims - a * inverse_scale;
}

// What a sample's distortion and rate are multiplied by before they are summed. elements: of the batch, or the sum of
// their weights.
ELBO_INLINE double reduction_weight(int64_t reduction, double batch, double elements) {
  return reduction == kBatchMean ? 1 / batch : reduction == kMean ? 1 / elements : 1;
}

// ------------------------------------------------------------------------------------------ O(B): what limits a rate

ELBO_INLINE bool limits_batch(int64_t mode) {
  return mode == kBatchCapacity || mode == kBatchFreeNats;
}

ELBO_INLINE bool limits_samples(int64_t mode) {
  return mode == kSampleCapacity || mode == kSampleFreeNats;
}

ELBO_INLINE bool is_floor(int64_t mode) {
  return mode == kBatchFreeNats || mode == kSampleFreeNats;
}

// What β multiplies in the place of a rate: max(K, λ), where NaN passes, or |K − C|.
ELBO_INLINE double limited(int64_t mode, double rate, double limit) {
  return is_floor(mode) ? (rate < limit ? limit : rate) : ::fabs(rate - limit);
}

// ∂ limited / ∂ rate
ELBO_INLINE double limited_slope(int64_t mode, double rate, double limit) {
  return is_floor(mode) ? static_cast<double>(rate >= limit) : static_cast<double>((rate > limit) - (rate < limit));
}

// ----------------------------------------------------------------------------------- O(B): the gradients' factors

// ∂L/∂(loss_i, distortion_i, rate_i), times the reduction's weight
struct Weight {
  double loss, distortion, rate;
};

// What a sample's elements are multiplied by, and its part of the gradients that are O(B) themselves.
struct Factors {
  double recon_scale;      // q ∂L/∂A_i, less the term of a σ that the batch shares; w_i where σ varies inside
  double grad_kl_clamped;  // the part of b_i that reaches the elements which free_bits lets through
  double grad_kl;          // the part that reaches all of them
  double log_sigma;        // w_i (D − A_i/σ^q)
  double beta;
};

ELBO_INLINE Factors
factors(int64_t mode, const Sigma& sigma, double a, double kl_clamped, double dims, double beta, const Weight& weight) {
  const double w = weight.loss + weight.distortion;
  Factors f = {w, weight.loss * beta, weight.rate, 0.0, weight.loss * kl_clamped};
  if (mode == kElement) return f;
  f.recon_scale = w * sigma.inverse_scale;
  f.log_sigma = w * distortion_slope(a, dims, sigma.inverse_scale);
  if (mode == kImage && a != 0) f.recon_scale += sigma.slope * f.log_sigma / a;
  return f;
}

// The same factors under a limit: β multiplies what that makes of a rate, the sample's or the batch's mean.
ELBO_INLINE void apply_limit(Factors& f, int64_t mode, const Weight& weight, double rate, double limit) {
  f.grad_kl_clamped *= limited_slope(mode, rate, limit);
  f.beta = weight.loss * limited(mode, rate, limit);
}

// What reaches every error of the batch through the σ that it shares: slope_sum = Σ_j w_j (D − A_j/σ^q).
ELBO_INLINE double shared_sigma_term(const Sigma& sigma, double slope_sum, double total) {
  return total == 0 ? 0.0 : sigma.slope * slope_sum / total;
}

}  // namespace elbo
