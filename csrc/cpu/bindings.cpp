// The operators of fused_elbo/operators/elbo.py for CPU tensors, against LibTorch's stable ABI: tensors in, plain
// structures to the kernels, tensors out. Arguments were validated in Python.
#include "../errors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <numeric>

#include "../aggregate.h"
#include "../levels.h"
#include "../operators.h"
#include "../outputs.h"
#include "aggregate.h"
#include "elbo.h"
#include "layout.h"

namespace elbo {

void register_operators(torch::stable::detail::StableLibrary& m);  // called by library.cpp, for one instruction set

namespace {

Inputs inputs_of(const Call& call) {
  return Inputs(call.tensors, call.options.sigma_mode, call.elements, /*for_cuda=*/false);
}

// Calls f with a number of the compute type.
template <class F>
auto computing(bool is_double, F f) {
  return is_double ? f(double{}) : f(float{});
}

// Rows of the samples', then their sum.
template <class A>
void write_stats(const Stats& stats, void* to) {
  A* at = static_cast<A*>(to);
  for (const auto* row : {&stats.a, &stats.kl, &stats.kl_clamped, &stats.weights}) {
    if (row == &stats.weights && row->empty()) return;
    at = std::transform(row->begin(), row->end(), at, [](double value) { return static_cast<A>(value); });
    *at++ = static_cast<A>(std::accumulate(row->begin(), row->end(), 0.0));
  }
}

Stats read_stats(const Tensor& stats) {
  const int64_t batch = stats.size(1) - 1;
  const auto row = [&](int64_t k) {
    std::vector<double> values(batch);
    const double* direct = read<double>(span_of(stats, stats.stride(0)), k, 0, batch, values.data());
    if (direct != values.data()) std::copy_n(direct, batch, values.data());
    return values;
  };
  return {row(0), row(1), row(2), stats.size(0) > 3 ? row(3) : std::vector<double>{}};
}

// Where the kernels write gradients.
GradientTensors gradients_of(const Inputs& in, const Call& call, int64_t mask) {
  GradientTensors tensors(in, call, mask, empty_pooled);
  Gradients& g = tensors.gradients;
  int64_t bytes = 0;  // of those that are as large as the data
  for (const Span* span : {&g.recon, &g.target, &g.element_log_sigma}) {
    if (span->base) bytes += in.batch.size * in.batch.data.dims * span->itemsize;
  }
  g.past_caches = passes_caches(bytes);
  return tensors;
}

// ------------------------------------------------------------------------------------------------------- operators

Tensor stats(const Call& call) {
  const Inputs in = inputs_of(call);
  const Tensor result = empty(in, {stats_rows(in.batch), in.batch.size + 1});
  computing(in.batch.is_double, [&](auto zero) {
    using A = decltype(zero);
    write_stats<A>(elbo_stats<A>(in.batch, call.options.extra_error), result.data_ptr());
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Call& call) {
  const Inputs in = inputs_of(call);
  const OutputTensors out(in, call);
  computing(in.batch.is_double, [&](auto zero) {
    using A = decltype(zero);
    Stats stats = elbo_stats<A>(in.batch, call.options.extra_error);
    write_stats<A>(stats, out.outputs.stats);
    elbo_finalize<A>(as_stored<A>(std::move(stats)), in.batch, call.options, out.outputs);
  });
  return {out.loss, out.distortion, out.rate, out.sigma, out.stats};
}

NineTensors grads(const GradsCall& call) {
  const Inputs in = inputs_of(call);
  GradientTensors out = gradients_of(in, call, call.mask);
  const Gradients& g = out.gradients;
  const auto factors = elbo_factors(read_stats(call.stats), in.batch, call.options, call.grad_outputs(), g);
  (in.batch.is_double ? elbo_grads<double> : elbo_grads<float>)(in.batch, factors, g);
  return out.finish();
}

decltype(std::tuple_cat(FourTensors{}, NineTensors{})) step(const StepCall& call) {
  const Inputs in = inputs_of(call);
  const OutputTensors out(in, call);
  GradientTensors gradients = gradients_of(in, call, call.mask);
  computing(in.batch.is_double, [&](auto zero) {
    using A = decltype(zero);
    // A number is rounded as it would be in a tensor of the compute type.
    const double scale = at(number_of(call.grad_scale, static_cast<A>(call.grad_scale_value)), 0);
    const Stats stats = elbo_step<A>(in.batch, call.options, scale, gradients.gradients);
    elbo_finalize<A>(stats, in.batch, call.options, out.outputs);
  });
  return std::tuple_cat(out.without_stats(), gradients.finish());
}

// ---------------------------------------------------------------------------------------------- a hierarchy's levels

Tensor levels(const LevelsCall& call) {
  const Levels in(call);
  return computing(in.has_double, [&](auto zero) {
    using A = decltype(zero);
    const Tensor result = in.empty_rates(call.per_level);
    const std::vector<double> sums = elbo_levels<A>(in.batch, in.latents, call.per_level);
    convert_to(span_of(result, 0), sums.data(), result.numel());
    return result;
  });
}

std::vector<Tensor> levels_grads(const LevelsGradsCall& call) {
  const Levels in(call);
  LevelsGradients out(in, call, empty_pooled);
  int64_t bytes = 0;
  for (int64_t i : call.wanted) bytes += call.tensors[i]->numel() * call.tensors[i]->element_size();
  for (Gradients& level : out.of_levels) level.latents_past_caches = passes_caches(bytes);
  const auto run = in.has_double ? elbo_levels_grads<double> : elbo_levels_grads<float>;
  run(in.batch, in.latents, call.grads(), out.of_levels);
  return out.finish();
}

// ------------------------------------------------------------------------------------------ the aggregate posterior

std::tuple<Tensor, Tensor> aggregate_sums(const AggregateCall& call) {
  const std::tuple<Tensor, Tensor> sums = call.empty_sums();
  const auto run = call.is_double() ? aggregate<double> : aggregate<float>;
  run(call.mixture(), matrix_of(std::get<0>(sums)), matrix_of(std::get<1>(sums)));
  return sums;
}

AggregateGradsCall::Returned aggregate_gradients(const AggregateGradsCall& call) {
  const AggregateGradsCall::Returned made = call.empty_gradients();
  const auto run = call.is_double() ? aggregate_grads<double> : aggregate_grads<float>;
  run(call.mixture(), call.given(), call.wanted(made));
  return made;
}

}  // namespace

void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("stats", Boxed<&stats>::call);
  m.impl("forward", Boxed<&forward>::call);
  m.impl("grads", Boxed<&grads>::call);
  m.impl("step", Boxed<&step>::call);
  m.impl("levels", Boxed<&levels>::call);
  m.impl("levels_grads", Boxed<&levels_grads>::call);
  m.impl("aggregate", Boxed<&aggregate_sums>::call);
  m.impl("aggregate_grads", Boxed<&aggregate_gradients>::call);
}

}  // namespace elbo
