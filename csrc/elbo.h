// What the kernels of every device are told of a call, and the arithmetic of O(batch) that they share. There are no
// tensors here: inputs.h, operators.h and outputs.h turn them into these structures. CUDA kernels are passed the
// structures as they are, and every pointer then names the device's memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "elbo_math.h"
#include "span.h"

namespace elbo {

// ---------------------------------------------------------------------------------------------------- what comes in

// What belongs to the elements of a sample, and may be repeated: log σ, a weight. Element e's lies at Σ e / divisor %
// size · stride over the dimensions, which are runs of the data's dimensions along which it is not repeated, the
// innermost in memory first. Where rank is 0, it lies as the data do.
struct Broadcast {
  static constexpr int kMaxRank = 8;
  struct Dim {
    int64_t divisor, size, stride;
  };

  Span values;
  int rank = 0;
  Dim dims[kMaxRank] = {};
};

// Index: wide enough to count a sample's elements. A GPU divides 32 bits much faster than 64.
template <class Index>
ELBO_INLINE int64_t offset_of(const Broadcast& broadcast, Index element) {
  int64_t offset = 0;
#pragma unroll 1
  for (int k = 0; k < broadcast.rank; ++k) {
    const Broadcast::Dim& dim = broadcast.dims[k];
    const Index at = element / static_cast<Index>(dim.divisor) % static_cast<Index>(dim.size);
    offset += static_cast<int64_t>(at) * dim.stride;
  }
  return offset;
}

struct Data {
  int64_t dims = 0;  // elements of a sample; 0: no data
  Span recon, target;
  double target_step = 1, target_low = 0;  // of a target of bytes
  int exponent = 2;
  int64_t activation = kNoActivation;
  bool has_log_sigma = false, has_weight = false;
  Broadcast log_sigma, weight;
};

struct Latents {
  int64_t dims = 0;  // elements of a sample; 0: no latents
  Span mu, logvar;
  bool has_prior = false, has_free_bits = false;  // the latter: free_bits > 0
  bool has_range = false;                         // logvar is clamped
  Span prior_mu, prior_logvar;
  double free_bits = 0, logvar_min = 0, logvar_max = 0;
};

// All is computed in double where anything is double, else in float: the compute type.
struct Batch {
  int64_t size = 0;
  bool is_double = false;
  Data data;
  Latents latents;
};

ELBO_INLINE int64_t stats_rows(const Batch& batch) {
  return batch.data.has_weight ? 4 : 3;
}

// One number, or one for each sample: from a tensor, or, where that has no base, `value`.
struct Number {
  Span tensor;  // of batch stride 0 where one value serves all
  double value = 0;
};

ELBO_INLINE double at(const Number& number, int64_t i) {
  double value = number.value;
  if (number.tensor.base == nullptr) return value;
  with_floating(number.tensor.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    value = static_cast<double>(*reinterpret_cast<const T*>(number.tensor.at(i, 0)));
  });
  return value;
}

// The options that count in arithmetic of O(batch); free_bits is the latents'.
struct Options {
  double q = 2;  // the likelihood's exponent
  bool constant = true;
  Number extra_error;  // 0 where there is none
  int64_t sigma_mode = kGiven;
  bool softclip = false;
  Number log_sigma;  // where σ is given, and does not vary inside a sample
  double min_log_sigma = 0;
  Number beta;
  int64_t limit_mode = kNoLimit;
  Number limit;
  int64_t reduction = kSum;
};

// --------------------------------------------------------------------------------------------------- what comes out

// Of the compute type. Without `loss` only stats are written.
struct Outputs {
  void *loss = nullptr, *distortion = nullptr, *rate = nullptr, *sigma = nullptr;
  bool sigma_each = false;  // sigma has a value for each sample
  void* stats = nullptr;    // [3, batch + 1]: A, KL, clamped KL; their sums in the last column. With weights also n
};

struct GradOutputs {
  Number loss, distortion, rate;
};

// Where gradients go; a span without a base is not wanted. Those of data and latents are dense.
struct Gradients {
  Span recon, target, mu, logvar, prior_mu, prior_logvar;
  Span element_log_sigma;  // of log σ at every element, as the data lie
  Span log_sigma;          // of a given log σ; on the CPU also of one that is broadcast inside samples, contiguous
  Span beta, extra_error;
  // On a GPU, of a log σ that neighbours share: the sum of `segment` of them each, of the compute type.
  void* segment_log_sigma = nullptr;
  int64_t segment = 0;
  bool log_sigma_each = false, beta_each = false, extra_error_each = false;  // a value for each sample
  bool past_caches = false, latents_past_caches = false;  // on the CPU: written so, being too large to be found there
};

ELBO_INLINE bool wants_data(const Gradients& g) {
  return g.recon.base || g.target.base || g.element_log_sigma.base || g.segment_log_sigma;
}

ELBO_INLINE bool wants_latents(const Gradients& g) {
  return g.mu.base || g.logvar.base || g.prior_mu.base || g.prior_logvar.base;
}

// ---------------------------------------------------------------------------------------------- arithmetic of O(batch)

// weights: the sum of the elements' weights over the batch, where they have any.
ELBO_INLINE double reduction_weight(const Options& options, const Batch& batch, double weights = 0) {
  const int64_t dims = batch.data.dims ? batch.data.dims : batch.latents.dims;
  const double size = static_cast<double>(batch.size), elements = size * static_cast<double>(dims);
  return reduction_weight(options.reduction, size, weights == 0 ? elements : weights);
}

// The σ of sample i, given A of the sample and of the batch, and how many elements, or weights of them, they are sums
// of; nothing of use where σ varies inside a sample.
ELBO_INLINE Sigma sigma_of(const Options& options, int64_t i, double a, double total, double elements, double dims) {
  if (options.sigma_mode == kElement) return Sigma{};
  if (options.sigma_mode == kGiven) return given_sigma(at(options.log_sigma, i), options.q);
  const bool shared = options.sigma_mode == kBatch;
  return optimal_sigma(
      shared ? total : a, shared ? elements : dims, options.min_log_sigma, options.softclip, options.q);
}

// The distortion of a sample, or where all have one σ that of the batch.
ELBO_INLINE double distortion_of(const Options& options, double a, double dims, const Sigma& sigma) {
  const double of_one = nats_of_one(options.q, options.constant);
  return options.sigma_mode == kElement ? distortion(a, dims, options.q, of_one)
                                        : distortion(a, dims, sigma, options.q, of_one);
}

// What β multiplies in the loss of a sample, where its limit, if any, is its own.
ELBO_INLINE double limited_rate(const Options& options, double kl_clamped) {
  return limits_samples(options.limit_mode) ? limited(options.limit_mode, kl_clamped, at(options.limit, 0))
                                            : kl_clamped;
}

// What a limit per batch makes of the samples' rates, which all are `mean` then: their sum, times β.
ELBO_INLINE double limited_batch(const Options& options, double batch, double mean) {
  return batch * at(options.beta, 0) * limited(options.limit_mode, mean, at(options.limit, 0));
}

// Whether loss and distortion weigh every sample alike.
ELBO_INLINE bool weighs_alike(const GradOutputs& grad_outputs) {
  return grad_outputs.loss.tensor.batch_stride == 0 && grad_outputs.distortion.tensor.batch_stride == 0;
}

// scale: the reduction's weight
ELBO_INLINE Weight weight_of(double scale, const GradOutputs& grad_outputs, int64_t i) {
  return {scale * at(grad_outputs.loss, i), scale * at(grad_outputs.distortion, i), scale * at(grad_outputs.rate, i)};
}

// The factors of sample i. mean_rate: of the batch, which a limit per batch is held against.
ELBO_INLINE Factors factors_of(
    const Options& options, const Sigma& sigma, int64_t i, double a, double kl_clamped, double dims, double mean_rate,
    const Weight& weight) {
  Factors f = factors(options.sigma_mode, sigma, a, kl_clamped, dims, at(options.beta, i), weight);
  if (options.limit_mode == kNoLimit) return f;
  const double rate = limits_batch(options.limit_mode) ? mean_rate : kl_clamped;
  apply_limit(f, options.limit_mode, weight, rate, at(options.limit, 0));
  return f;
}

}  // namespace elbo
