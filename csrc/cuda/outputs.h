// The tensors that a call returns, and the memory that its kernels need besides.
#pragma once

#include <tuple>

#include "inputs.h"

namespace elbo {

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Tensor empty(const Inputs& in, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(in.any(), sizes, in.dtype());
}

// Partial sums: of the latents, and of the data where asked.
struct Sums {
  std::optional<Tensor> s, kl, clamped;
  Partials partials;

  Sums(const Inputs& in, bool of_data) {
    const Batch& batch = in.batch;
    if (of_data && batch.data.dims) partials.s = make(s, in, batch.data.pieces);
    if (batch.latents.dims == 0) return;
    partials.kl = make(kl, in, batch.latents.pieces);
    partials.clamped = batch.latents.free_bits > 0 ? make(clamped, in, batch.latents.pieces) : partials.kl;
  }

 private:
  static void* make(std::optional<Tensor>& t, const Inputs& in, const Pieces& pieces) {
    t = empty(in, {pieces.count});
    return t->data_ptr();
  }
};

// What forward returns.
struct ForLoss {
  Tensor loss, distortion, rate, sigma, stats;
  Outputs outputs;

  ForLoss(const Inputs& in, const OptTensor& log_sigma, const Knobs& knobs) {
    const std::vector<int64_t> each = {in.batch.size}, one;
    const auto& shape = knobs.reduction == kNone ? each : one;
    std::vector<int64_t> sigma_shape;
    if (knobs.sigma_mode == kElement) sigma_shape = {0};
    if (knobs.sigma_mode == kImage) sigma_shape = each;
    if (knobs.sigma_mode == kGiven && log_sigma && log_sigma->dim() == 1) sigma_shape = {log_sigma->size(0)};
    loss = empty(in, shape);
    distortion = empty(in, shape);
    rate = empty(in, shape);
    sigma = empty(in, sigma_shape);
    stats = empty(in, {3, in.batch.size + 1});
    outputs = {loss.data_ptr(),  distortion.data_ptr(), rate.data_ptr(),
               sigma.data_ptr(), sigma.numel() > 1,     stats.data_ptr()};
  }
};

// The tensors that gradients are asked for, as the schema has them, and the mask that says which.
struct Wanted {
  const OptTensor &recon, &target, &mu, &logvar, &log_sigma, &prior_mu, &prior_logvar, &beta;
  int64_t mask;
};

// What grads returns.
class ForGradients {
 public:
  Gradients gradients;

  ForGradients(const Inputs& in, const Knobs& knobs, const Wanted& wanted) : in_(in), wanted_(wanted) {
    const ScalarType of_target = in.batch.data.target.dtype;
    Gradients& g = gradients;
    g.recon = large(kRecon, wanted.recon, in.recon, in.batch.data.recon.dtype);
    g.target = large(kTarget, wanted.target, in.recon, of_target);
    g.mu = of_latents(kMu, wanted.mu);
    g.logvar = of_latents(kLogvar, wanted.logvar);
    g.prior_mu = of_latents(kPriorMu, wanted.prior_mu);
    g.prior_logvar = of_latents(kPriorLogvar, wanted.prior_logvar);
    g.beta = small(kBeta, wanted.beta, g.beta_each);
    if (knobs.sigma_mode != kElement) {
      g.log_sigma = small(kLogSigma, wanted.log_sigma, g.log_sigma_each);
    } else if (in.log_sigma_is_broadcast && has(kLogSigma)) {
      of_elements_ = empty_in_order(in.recon, in.dtype());
      g.element_log_sigma = span_of(*of_elements_);
    } else {
      g.element_log_sigma = large(kLogSigma, wanted.log_sigma, in.recon, of_target);
    }
  }

  EightTensors finish() {
    if (of_elements_) small_[kLogSigma] = summed_like(*of_elements_, *wanted_.log_sigma);
    return {result(kRecon),    result(kTarget),  result(kMu),          result(kLogvar),
            result(kLogSigma), result(kPriorMu), result(kPriorLogvar), result(kBeta)};
  }

 private:
  enum Bit { kRecon, kTarget, kMu, kLogvar, kLogSigma, kPriorMu, kPriorLogvar, kBeta, kBits };

  const Inputs& in_;
  const Wanted wanted_;
  std::optional<Output> large_[kBits];
  std::optional<Tensor> small_[kBits];  // O(B), or summed
  std::optional<Tensor> of_elements_;   // where one log σ has many elements: the gradient of each, to be summed

  bool has(Bit bit) const {
    return (wanted_.mask >> bit & 1) != 0;
  }

  Span large(Bit bit, const OptTensor& input, const Tensor& lead, ScalarType written) {
    if (!has(bit)) return {};
    large_[bit].emplace(*input, lead, written);
    return span_of(large_[bit]->buffer);
  }

  Span of_latents(Bit bit, const OptTensor& input) {
    return large(bit, input, in_.mu, input ? input->scalar_type() : ScalarType::Float);
  }

  Span small(Bit bit, const OptTensor& input, bool& each) {
    if (!has(bit)) return {};
    small_[bit] = torch::stable::empty_like(*input);
    each = small_[bit]->numel() > 1;
    return span_of(*small_[bit], each ? 1 : 0);
  }

  Tensor result(Bit bit) {
    if (large_[bit]) return large_[bit]->finish();
    return small_[bit] ? *small_[bit] : torch::stable::new_empty(in_.any(), {0}, ScalarType::Float);
  }
};

}  // namespace elbo
