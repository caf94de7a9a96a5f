// The tensors that a call returns.
#pragma once

#include <tuple>

#include "inputs.h"
#include "operators.h"

namespace elbo {

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Tensor empty(const Inputs& in, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t k = sizes.size(); k-- > 1;) strides[k - 1] = strides[k] * sizes[k];
  return empty_strided(sizes, strides, in.dtype(), in.any());
}

// What forward returns, in the order of `Outputs` in fused_elbo/call.py.
struct OutputTensors {
  Tensor loss, distortion, rate, sigma, stats;
  Outputs outputs;

  OutputTensors(const Inputs& in, const Call& call)
      : loss(empty(in, reduced(in, call))),
        distortion(empty(in, reduced(in, call))),
        rate(empty(in, reduced(in, call))),
        sigma(empty(in, of_sigma(in, call))),
        stats(empty(in, {stats_rows(in.batch), in.batch.size + 1})) {
    outputs = {loss.data_ptr(),  distortion.data_ptr(), rate.data_ptr(),
               sigma.data_ptr(), sigma.numel() > 1,     stats.data_ptr()};
  }

  FourTensors without_stats() const {
    return {loss, distortion, rate, sigma};
  }

 private:
  using Sizes = std::vector<int64_t>;

  static Sizes reduced(const Inputs& in, const Call& call) {
    return call.options.reduction == kNone ? Sizes{in.batch.size} : Sizes{};
  }

  static Sizes of_sigma(const Inputs& in, const Call& call) {
    const OptTensor& given = call.tensors.log_sigma;
    switch (call.options.sigma_mode) {
      case kElement:
        return {0};
      case kImage:
        return {in.batch.size};
      case kGiven:
        return given && given->dim() == 1 ? Sizes{given->size(0)} : Sizes{};
      default:
        return {};
    }
  }
};

// The gradients that `mask` asks for: memory that the kernels write to, then the tensors to return. `empty` makes those
// that may be large. segment: 0, or how many neighbours, inside those that surely share one log σ, have one sum.
class GradientTensors {
 public:
  Gradients gradients;

  GradientTensors(const Inputs& in, const Call& call, int64_t mask, MakeEmpty empty, int64_t segment = 0)
      : in_(in), tensors_(call.tensors), mask_(mask), empty_(empty) {
    const Tensors& t = call.tensors;
    const Data& data = in.batch.data;
    Gradients& g = gradients;
    g.recon = large(kRecon, t.recon, in.recon, data.recon.dtype);
    g.target = large(kTarget, t.target, in.recon, data.target.dtype);
    g.mu = of_latents(kMu, t.mu);
    g.logvar = of_latents(kLogvar, t.logvar);
    g.prior_mu = of_latents(kPriorMu, t.prior_mu);
    g.prior_logvar = of_latents(kPriorLogvar, t.prior_logvar);
    g.beta = small(kBeta, t.beta, g.beta_each);
    g.extra_error = small(kExtraError, t.extra_error, g.extra_error_each);
    if (call.options.sigma_mode != kElement) {
      g.log_sigma = small(kLogSigma, t.log_sigma, g.log_sigma_each);
    } else if (!in.log_sigma_is_broadcast) {
      g.element_log_sigma = large(kLogSigma, t.log_sigma, in.recon, data.log_sigma.values.dtype);
    } else if (!in.for_cuda && data.log_sigma.rank > 0) {
      g.log_sigma = large(kLogSigma, t.log_sigma, in.log_sigma, data.log_sigma.values.dtype);
    } else if (has(kLogSigma) && segment) {
      to_sum_ = empty_segments(segment);
      g.segment_log_sigma = to_sum_->data_ptr();
      g.segment = segment;
    } else if (has(kLogSigma)) {
      to_sum_ = empty_in_order(*in.recon, in.dtype());
      g.element_log_sigma = span_of(*to_sum_);
    }
  }

  NineTensors finish() {
    if (to_sum_) small_[kLogSigma] = summed_like(*to_sum_, *tensors_.log_sigma);
    return {result(kRecon),   result(kTarget),      result(kMu),   result(kLogvar),    result(kLogSigma),
            result(kPriorMu), result(kPriorLogvar), result(kBeta), result(kExtraError)};
  }

 private:
  enum Bit { kRecon, kTarget, kMu, kLogvar, kLogSigma, kPriorMu, kPriorLogvar, kBeta, kExtraError, kBits };

  const Inputs& in_;
  const Tensors& tensors_;
  const int64_t mask_;
  const MakeEmpty empty_;
  std::optional<Output> large_[kBits];
  std::optional<Tensor> small_[kBits];  // O(B), or summed
  std::optional<Tensor> to_sum_;        // where one log σ has many elements: the gradient of each, or of segments

  bool has(Bit bit) const {
    return (mask_ >> bit & 1) != 0;
  }

  // walked: the tensor in whose order the kernels write
  Span large(Bit bit, const OptTensor& input, const OptTensor& walked, ScalarType written) {
    if (!has(bit)) return {};
    large_[bit].emplace(*input, *walked, written, empty_);
    return span_of(large_[bit]->written_to());
  }

  Span of_latents(Bit bit, const OptTensor& input) {
    return large(bit, input, in_.latents.mu, input ? input->scalar_type() : ScalarType::Float);
  }

  Span small(Bit bit, const OptTensor& input, bool& each) {
    if (!has(bit)) return {};
    small_[bit] = torch::stable::empty_like(*input);
    each = small_[bit]->numel() > 1;
    return span_of(*small_[bit], each ? 1 : 0);
  }

  // One number for each segment of recon, in its order. The dimensions inside the innermost run have become one.
  Tensor empty_segments(int64_t segment) const {
    const Tensor& recon = *in_.recon;
    const int64_t run = in_.batch.data.log_sigma.dims[0].divisor;
    std::vector<int64_t> sizes = {recon.size(0)}, strides = {in_.batch.data.dims / segment};
    bool is_first = true;
    for (int64_t k = 1; k < recon.dim(); ++k) {
      const bool inside = recon.size(k) == 1 || recon.stride(k) < run, stands_for_all = inside && is_first;
      sizes.push_back(stands_for_all ? run / segment : inside ? 1 : recon.size(k));
      strides.push_back(inside ? 1 : recon.stride(k) / segment);
      is_first &= !inside;
    }
    return empty_strided(sizes, strides, in_.dtype(), recon);
  }

  // Sums gradients into the shape of what was broadcast to their elements.
  static Tensor summed_like(const Tensor& gradients, const Tensor& input) {
    std::vector<int64_t> along;
    for (int64_t k = 0; k < input.dim(); ++k) {
      if (input.size(k) != gradients.size(k)) along.push_back(k);
    }
    Tensor result = torch::stable::empty_like(input);
    // PyTorch takes no dimensions for all of them.
    torch::stable::copy_(result, along.empty() ? gradients : torch::stable::sum(gradients, along, true));
    return result;
  }

  Tensor result(Bit bit) {
    if (large_[bit]) return large_[bit]->finish();
    if (small_[bit]) return *small_[bit];
    const int64_t none = 0, stride = 1;
    return empty_strided({&none, 1}, {&stride, 1}, ScalarType::Float, in_.any());
  }
};

}  // namespace elbo
