// The tensors of a call as the kernels can walk them: in one order, and of dtypes that there are kernels for.
#pragma once

#include <limits>
#include <optional>

#include "elbo.h"
#include "layout.h"

namespace elbo {

// The tensors of an operator, in the order of fused_elbo/call.py.
struct Tensors {
  OptTensor recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, extra_error, limit, weight;
};

// The options that count for every element.
struct ElementOptions {
  int exponent = 2;
  int64_t activation = kNoActivation;
  double target_low = 0, target_step = 1;
  double free_bits = 0;
  std::optional<double> logvar_min, logvar_max;
};

inline Span span_of(const Tensor& t, int64_t batch_stride) {
  return {static_cast<char*>(t.data_ptr()), t.scalar_type(), static_cast<int64_t>(t.element_size()), batch_stride};
}

inline Span span_of(const Tensor& t) {
  return span_of(t, t.size(0) == 1 ? 0 : t.stride(0));
}

// A tensor of one value or of one for each sample; or, where there is none, a number.
inline Number number_of(const OptTensor& t, double value) {
  if (!t) return {{}, value};
  return {span_of(*t, t->numel() == 1 ? 0 : t->stride(0)), 0};
}

inline bool is_double(const OptTensor& t) {
  return t && t->scalar_type() == ScalarType::Double;
}

// Latents, kept alive beside what the kernels see of them.
struct LatentInputs {
  OptTensor mu, logvar, prior_mu, prior_logvar;
  Latents latents;

  LatentInputs() = default;

  LatentInputs(
      const Tensor& m, const Tensor& l, const OptTensor& p_m, const OptTensor& p_l, const ElementOptions& options)
      : mu(walkable(m)), logvar(in_order_of(l, *mu)) {
    latents.dims = sample_size(*mu);
    latents.mu = span_of(*mu);
    latents.logvar = span_of(*logvar);
    latents.has_free_bits = options.free_bits > 0;
    latents.free_bits = options.free_bits;
    latents.has_range = options.logvar_min && options.logvar_max;
    latents.logvar_min = options.logvar_min.value_or(0);
    latents.logvar_max = options.logvar_max.value_or(0);
    if (!p_m) return;
    prior_mu = in_order_of(*p_m, *mu);
    prior_logvar = in_order_of(*p_l, *mu);
    latents.has_prior = true;
    latents.prior_mu = span_of(*prior_mu);
    latents.prior_logvar = span_of(*prior_logvar);
  }
};

// All tensors of a call. for_cuda: those kernels take fewer dtypes, and count a sample's elements in 32 bits where log
// σ is broadcast to them.
struct Inputs {
  OptTensor recon, target, log_sigma, weight;
  LatentInputs latents;
  Batch batch;
  bool for_cuda;
  bool log_sigma_is_broadcast = false;

  Inputs(const Tensors& t, int64_t sigma_mode, const ElementOptions& options, bool for_cuda) : for_cuda(for_cuda) {
    batch.size = (t.recon ? *t.recon : *t.mu).size(0);
    batch.is_double = is_double(t.recon) || is_double(t.target) || is_double(t.mu) || is_double(t.logvar);
    const bool inside = t.recon && t.log_sigma && sigma_mode == kElement;
    if (t.recon) set_data(*t.recon, *t.target, inside ? t.log_sigma : std::nullopt);
    Data& data = batch.data;
    data.exponent = options.exponent;
    data.activation = options.activation;
    data.target_low = options.target_low;
    data.target_step = options.target_step;
    if (inside) set_log_sigma(*t.log_sigma);
    if (t.weight) set_weight(*t.weight);
    if (t.mu) latents = LatentInputs(*t.mu, *t.logvar, t.prior_mu, t.prior_logvar, options);
    batch.latents = latents.latents;
  }

  ScalarType dtype() const {
    return batch.is_double ? ScalarType::Double : ScalarType::Float;
  }

  const Tensor& any() const {
    return recon ? *recon : *latents.mu;
  }

 private:
  // On a GPU: recon in its own dtype, target in the same, in float or in bytes; all else double where anything is. A
  // log σ for each element has target's dtype too, or, beside bytes, that of the computation.
  void set_data(const Tensor& r, const Tensor& t, const OptTensor& element_log_sigma) {
    recon = walkable(r);
    if (for_cuda && batch.is_double) recon = in_order_of(*recon, *recon, ScalarType::Double);
    log_sigma_is_broadcast = element_log_sigma && element_log_sigma->numel() != recon->numel();
    bool alike = t.scalar_type() == recon->scalar_type();
    if (element_log_sigma && !log_sigma_is_broadcast) alike &= element_log_sigma->scalar_type() == t.scalar_type();
    const bool as_it_is = alike || t.scalar_type() == ScalarType::Byte || !for_cuda;
    target = in_order_of(t, *recon, as_it_is ? t.scalar_type() : dtype());
    Data& data = batch.data;
    data.dims = sample_size(*recon);
    data.recon = span_of(*recon);
    data.target = span_of(*target);
  }

  void set_log_sigma(const Tensor& values) {
    batch.data.has_log_sigma = true;
    const ScalarType of_target = target->scalar_type() == ScalarType::Byte ? dtype() : target->scalar_type();
    const ScalarType as_the_data = for_cuda ? of_target : values.scalar_type();
    if (!log_sigma_is_broadcast) {
      log_sigma = in_order_of(values, *recon, as_the_data);
    } else {
      log_sigma =
          for_cuda ? of_dtype(values, dtype()) : as_large_as(values, [&] { return torch::stable::contiguous(values); });
      if (set_broadcast(batch.data.log_sigma, *log_sigma)) return;
      log_sigma = empty_in_order(*recon, as_the_data);
      torch::stable::copy_(*log_sigma, values);
    }
    batch.data.log_sigma.values = span_of(*log_sigma);
  }

  // On a GPU of no wider dtype than the computation's.
  void set_weight(const Tensor& given) {
    batch.data.has_weight = true;
    const bool too_wide = for_cuda && !batch.is_double && given.scalar_type() == ScalarType::Double;
    const Tensor values = too_wide ? of_dtype(given, dtype()) : given;
    if (values.numel() == recon->numel()) {
      weight = in_order_of(values, *recon);
    } else {
      weight = as_large_as(values, [&] { return torch::stable::contiguous(values); });
      if (set_broadcast(batch.data.weight, *weight)) return;
      weight = empty_in_order(*recon, values.scalar_type());
      torch::stable::copy_(*weight, values);
    }
    batch.data.weight.values = span_of(*weight);
  }

  // False where a contiguous tensor cannot be read where it lies, with any of recon's layouts.
  bool set_broadcast(Broadcast& broadcast, const Tensor& values) {
    const int64_t longest = for_cuda ? std::numeric_limits<uint32_t>::max() : std::numeric_limits<int64_t>::max();
    if (batch.data.dims > longest) return false;
    const auto stride_of = [&](int64_t k) { return values.size(k) == 1 ? 0 : values.stride(k); };
    broadcast.values = span_of(values, recon->size(0) == 1 ? 0 : stride_of(0));
    const auto order = memory_order(*recon);
    int64_t divisor = 1;
    for (auto k = order.rbegin(); k != order.rend(); ++k) {
      const int64_t size = recon->size(*k), stride = stride_of(*k);
      Broadcast::Dim* last = broadcast.rank ? &broadcast.dims[broadcast.rank - 1] : nullptr;
      if (last && divisor == last->divisor * last->size && stride == last->size * last->stride) {
        last->size *= size;
      } else if (stride != 0) {
        if (broadcast.rank == Broadcast::kMaxRank) {
          broadcast.rank = 0;
          return false;
        }
        broadcast.dims[broadcast.rank++] = {divisor, size, stride};
      }
      divisor *= size;
    }
    if (broadcast.rank == 0) broadcast.dims[broadcast.rank++] = {divisor, 1, 0};  // one value for the whole sample
    return true;
  }
};

}  // namespace elbo
