// The operators of fused_elbo/operators/aggregate.py: how they are called.
#pragma once

#include "inputs.h"
#include "mixture.h"
#include "operators.h"

namespace elbo {

inline Matrix matrix_of(const Tensor& t) {
  return {span_of(t, t.stride(0)), t.size(0), t.dim() > 1 ? t.size(1) : 1, t.dim() > 1 ? t.stride(1) : 1};
}

inline Matrix matrix_of(const OptTensor& t) {
  return t ? matrix_of(*t) : Matrix{};
}

// What both begin with.
struct AggregateCall {
  Tensor z, mu, logvar;  // [batch, latents], [components, latents] twice: of one dtype, of any strides
  int64_t own;           // the component that z[0] was drawn from, z[1] from the next one, and so on; or negative
  std::optional<int64_t> dataset_size;

  explicit AggregateCall(Arguments& in)
      : z(in.next<Tensor>()),
        mu(in.next<Tensor>()),
        logvar(in.next<Tensor>()),
        own(in.next<int64_t>()),
        dataset_size(in.next<std::optional<int64_t>>()) {}

  int64_t batch() const {
    return z.size(0);
  }

  int64_t components() const {
    return mu.size(0);
  }

  int64_t latents() const {
    return z.size(1);
  }

  bool is_double() const {
    return z.scalar_type() == ScalarType::Double;
  }

  MixtureWeights log_weights() const {
    return mixture_log_weights(components(), own >= 0 ? dataset_size.value_or(components()) : components());
  }

  Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) const {
    return empty_strided(sizes, strides, is_double() ? ScalarType::Double : ScalarType::Float, z);
  }

  MixtureOf mixture() const {
    return {matrix_of(z), matrix_of(mu), matrix_of(logvar), own, log_weights()};
  }

  // What `aggregate` returns.
  std::tuple<Tensor, Tensor> empty_sums() const {
    return {empty({batch()}, {1}), empty({batch(), latents()}, {latents(), 1})};
  }
};

struct AggregateGradsCall : AggregateCall {
  Tensor joint, marginals;
  OptTensor grad_joint, grad_marginals;
  int64_t mask;  // of z, mu, logvar

  explicit AggregateGradsCall(Arguments& in)
      : AggregateCall(in),
        joint(in.next<Tensor>()),
        marginals(in.next<Tensor>()),
        grad_joint(in.next<OptTensor>()),
        grad_marginals(in.next<OptTensor>()),
        mask(in.next<int64_t>()) {}

  SumsGiven given() const {
    return {matrix_of(joint), matrix_of(marginals), matrix_of(grad_joint), matrix_of(grad_marginals)};
  }

  using Returned = std::tuple<Tensor, Tensor, Tensor>;

  // What `aggregate_grads` returns: like the inputs, or without elements where it is not wanted.
  Returned empty_gradients() const {
    const auto made = [&](int bit, const Tensor& input) {
      if (mask >> bit & 1) return torch::stable::empty_like(input);
      const int64_t none = 0, stride = 1;
      return empty_strided({&none, 1}, {&stride, 1}, input.scalar_type(), input);
    };
    return {made(0, z), made(1, mu), made(2, logvar)};
  }

  MixtureGradients wanted(const Returned& made) const {
    const auto& [z, mu, logvar] = made;
    const auto matrix = [&](int bit, const Tensor& t) { return mask >> bit & 1 ? matrix_of(t) : Matrix{}; };
    return {matrix(0, z), matrix(1, mu), matrix(2, logvar)};
  }
};

}  // namespace elbo
