// How the operators of fused_elbo/call.py are called: their flat arguments, read once into structures, and PyTorch's
// stack, from which they come and to which the results go.
#pragma once

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <tuple>

#include "inputs.h"

namespace elbo {

// PyTorch's stack of an operator's arguments, from the first one on. Whoever reads one owns it.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}

  template <class T>
  T next() {
    check(next_ != end_);
    return torch::stable::detail::to<T>(*next_++);
  }

  void finish() const {
    check(next_ == end_);
  }

 private:
  StableIValue *next_, *end_;

  static void check(bool alike) {
    if (!alike) throw std::runtime_error("fused_elbo: an operator's schema and its kernel differ in their arguments");
  }
};

// Tensors, then options: what every operator begins with.
struct Call {
  Tensors tensors;
  Options options;
  ElementOptions elements;

  explicit Call(Arguments& in) {
    const auto tensor = [&] { return in.next<OptTensor>(); };
    tensors = {tensor(), tensor(), tensor(), tensor(), tensor(), tensor(),
               tensor(), tensor(), tensor(), tensor(), tensor()};
    const Tensors& t = tensors;
    elements.exponent = static_cast<int>(in.next<int64_t>());
    elements.activation = in.next<int64_t>();
    options.q = elements.exponent;
    options.constant = in.next<bool>();
    elements.target_low = in.next<double>();
    elements.target_step = (in.next<double>() - elements.target_low) / 255;
    options.sigma_mode = in.next<int64_t>();
    options.softclip = in.next<bool>();
    const double log_sigma_value = in.next<double>();
    options.min_log_sigma = in.next<double>();
    elements.free_bits = in.next<double>();
    const double beta_value = in.next<double>();
    options.limit_mode = in.next<int64_t>();
    const double limit_value = in.next<double>();
    elements.logvar_min = in.next<std::optional<double>>();
    elements.logvar_max = in.next<std::optional<double>>();
    options.reduction = in.next<int64_t>();
    options.log_sigma = number_of(options.sigma_mode == kGiven ? t.log_sigma : std::nullopt, log_sigma_value);
    options.beta = number_of(t.beta, beta_value);
    options.limit = number_of(t.limit, limit_value);
    options.extra_error = number_of(t.extra_error, 0);
  }
};

struct GradsCall : Call {
  Tensor stats;
  OptTensor grad_loss, grad_distortion, grad_rate;
  int64_t mask;  // a bit for each gradient that is wanted, in the order of `Gradients` in call.py

  explicit GradsCall(Arguments& in)
      : Call(in),
        stats(in.next<Tensor>()),
        grad_loss(in.next<OptTensor>()),
        grad_distortion(in.next<OptTensor>()),
        grad_rate(in.next<OptTensor>()),
        mask(in.next<int64_t>()) {}

  GradOutputs grad_outputs() const {
    return {number_of(grad_loss, 0), number_of(grad_distortion, 0), number_of(grad_rate, 0)};
  }
};

struct StepCall : Call {
  OptTensor grad_scale;
  double grad_scale_value;
  int64_t mask;

  explicit StepCall(Arguments& in)
      : Call(in), grad_scale(in.next<OptTensor>()), grad_scale_value(in.next<double>()), mask(in.next<int64_t>()) {}
};

template <class Result>
void give(StableIValue* stack, const Result& result) {
  stack[0] = torch::stable::detail::from<Result>(result);
}

template <class... Each>
void give(StableIValue* stack, const std::tuple<Each...>& results) {
  torch::stable::detail::box_from_tuple<Each...>(stack, results);
}

// An operator of a `Call`, or of what else is made of Arguments, as PyTorch's dispatcher calls it.
template <auto operator_>
struct Boxed;

template <class Result, class Of, Result (*operator_)(const Of&)>
struct Boxed<operator_> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t) {
    Arguments in(stack, arguments);
    const Of of(in);
    in.finish();
    give(stack, operator_(of));
  }
};

}  // namespace elbo
