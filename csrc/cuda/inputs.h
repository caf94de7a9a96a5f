// The tensors of a call as the kernels can walk them: in one order, and of dtypes that there are kernels for.
#pragma once

#include <limits>
#include <optional>

#include "../layout.h"
#include "elbo.h"

namespace elbo {

using OptTensor = std::optional<Tensor>;

inline Span span_of(const Tensor& t, int64_t batch_stride) {
  return {static_cast<char*>(t.data_ptr()), t.scalar_type(), static_cast<int64_t>(t.element_size()), batch_stride};
}

// Sums a gradient of every element into the shape of what was broadcast to them.
inline Tensor summed_like(const Tensor& of_elements, const Tensor& input) {
  std::vector<int64_t> along;
  for (int64_t k = 0; k < input.dim(); ++k) {
    if (input.size(k) != of_elements.size(k)) along.push_back(k);
  }
  Tensor result = torch::stable::empty_like(input);
  torch::stable::copy_(result, torch::stable::sum(of_elements, along, true));
  return result;
}

// The tensors, kept alive beside what the kernels see of them.
struct Inputs {
  Tensor recon, target, log_sigma, mu, logvar, prior_mu, prior_logvar;
  Batch batch;
  bool log_sigma_is_broadcast = false;

  Inputs(
      const OptTensor& r, const OptTensor& t, const OptTensor& m, const OptTensor& l,
      const OptTensor& element_log_sigma, const OptTensor& p_m, const OptTensor& p_l, double free_bits) {
    batch.size = (r ? *r : *m).size(0);
    for (const OptTensor* x : {&r, &t, &m, &l}) batch.is_double |= *x && (*x)->scalar_type() == ScalarType::Double;
    if (r) set_data(*r, *t, element_log_sigma);
    if (r && element_log_sigma) set_log_sigma(*element_log_sigma);
    if (m) set_latents(*m, *l, p_m, p_l, free_bits);
  }

  ScalarType dtype() const {
    return batch.is_double ? ScalarType::Double : ScalarType::Float;
  }

  const Tensor& any() const {
    return batch.data.dims ? recon : mu;
  }

 private:
  // recon in its own dtype, target in the same or in float; all double where anything is. A log σ for each element has
  // target's dtype too.
  void set_data(const Tensor& r, const Tensor& t, const OptTensor& element_log_sigma) {
    const Tensor lead = leader(r);
    recon = in_order_of(lead, lead, batch.is_double ? ScalarType::Double : lead.scalar_type());
    log_sigma_is_broadcast = element_log_sigma && element_log_sigma->numel() != recon.numel();
    bool alike = t.scalar_type() == recon.scalar_type();
    if (element_log_sigma && !log_sigma_is_broadcast) alike &= element_log_sigma->scalar_type() == t.scalar_type();
    target = in_order_of(t, recon, alike ? t.scalar_type() : dtype());
    Data& data = batch.data;
    data.dims = sample_size(recon);
    data.pieces = pieces_of(data.dims, batch.size);
    data.recon = span_of(recon);
    data.target = span_of(target);
  }

  // Where log σ is broadcast it is small, and cast to the compute type.
  void set_log_sigma(const Tensor& values) {
    Data& data = batch.data;
    data.has_log_sigma = true;
    if (log_sigma_is_broadcast) {
      log_sigma = values.scalar_type() == dtype() ? values : torch::stable::to(values, dtype());
      if (set_levels()) return;
      data.log_sigma.levels = 0;
      log_sigma = empty_in_order(recon, target.scalar_type());
      torch::stable::copy_(log_sigma, values);
    } else {
      log_sigma = in_order_of(values, recon, target.scalar_type());
    }
    data.log_sigma.values = span_of(log_sigma);
  }

  // False where log σ cannot be read where it lies, with any of recon's layouts.
  bool set_levels() {
    Inside& inside = batch.data.log_sigma;
    if (batch.data.dims > std::numeric_limits<uint32_t>::max()) return false;
    const auto stride_of = [&](int64_t k) { return log_sigma.size(k) == 1 ? 0 : log_sigma.stride(k); };
    inside.values = span_of(log_sigma, stride_of(0));
    const auto order = memory_order(recon);
    uint32_t divisor = 1;
    for (auto k = order.rbegin(); k != order.rend(); ++k) {
      const uint32_t size = static_cast<uint32_t>(recon.size(*k));
      Inside::Level* last = inside.levels ? &inside.level[inside.levels - 1] : nullptr;
      if (last && divisor == last->divisor * last->size && stride_of(*k) == last->size * last->stride) {
        last->size *= size;
      } else if (stride_of(*k) != 0) {
        if (inside.levels == Inside::kMaxLevels) return false;
        inside.level[inside.levels++] = {divisor, size, stride_of(*k)};
      }
      divisor *= size;
    }
    if (inside.levels == 0) inside.level[inside.levels++] = {1, 1, 0};  // one value for the whole sample
    return true;
  }

  void set_latents(const Tensor& m, const Tensor& l, const OptTensor& p_m, const OptTensor& p_l, double free_bits) {
    Latents& latents = batch.latents;
    mu = leader(m);
    logvar = in_order_of(l, mu);
    latents.dims = sample_size(mu);
    latents.pieces = pieces_of(latents.dims, batch.size);
    latents.mu = span_of(mu);
    latents.logvar = span_of(logvar);
    latents.free_bits = free_bits;
    if (!p_m) return;
    prior_mu = in_order_of(*p_m, mu);
    prior_logvar = in_order_of(*p_l, mu);
    latents.has_prior = true;
    latents.prior_mu = span_of(prior_mu);
    latents.prior_logvar = span_of(prior_logvar);
  }
};

}  // namespace elbo
