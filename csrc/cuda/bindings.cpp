// The operators of fused_elbo/operators/elbo.py for CUDA tensors, against LibTorch's stable ABI: tensors in, plain
// structures to the launch functions, tensors out. Arguments were validated in Python. Nothing here waits for the
// device or reads a value from it.
#include "../errors.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../aggregate.h"
#include "../levels.h"
#include "../operators.h"
#include "../outputs.h"
#include "aggregate.h"
#include "elbo_levels.h"
#include "sums.h"

#ifndef ELBO_DISPATCH_KEY
#define ELBO_DISPATCH_KEY CUDA
#endif

namespace elbo {
namespace {

// The device of a call's tensors as the current one, and the stream that PyTorch has for it.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;

  explicit OnDevice(const Call& call)
      : OnDevice((call.tensors.recon ? call.tensors.recon : call.tensors.mu)->get_device()) {}

  explicit OnDevice(const LevelsInputs& call) : OnDevice(call.tensors[0]->get_device()) {}

  explicit OnDevice(const AggregateCall& call) : OnDevice(call.z.get_device()) {}

 private:
  explicit OnDevice(int32_t device) : guard(device) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

Inputs inputs_of(const Call& call) {
  return Inputs(call.tensors, call.options.sigma_mode, call.elements, /*for_cuda=*/true);
}

// Stages one and two.
void run_forward(
    const Inputs& in, const ChunkedBatch& batch, const Options& options, const Outputs& outputs, cudaStream_t stream) {
  const Sums sums(in, batch, true);
  elbo_stats(batch, sums.partials, stream);
  elbo_finalize(batch, sums.partials, options, outputs, stream);
}

// ------------------------------------------------------------------------------------------------------- operators

Tensor stats(const Call& call) {
  const OnDevice on(call);
  const Inputs in = inputs_of(call);
  const Tensor result = empty(in, {stats_rows(in.batch), in.batch.size + 1});
  Outputs outputs;
  outputs.stats = result.data_ptr();
  run_forward(in, chunked(in.batch), call.options, outputs, on.stream);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Call& call) {
  const OnDevice on(call);
  const Inputs in = inputs_of(call);
  const OutputTensors out(in, call);
  run_forward(in, chunked(in.batch), call.options, out.outputs, on.stream);
  return {out.loss, out.distortion, out.rate, out.sigma, out.stats};
}

NineTensors grads(const GradsCall& call) {
  const OnDevice on(call);
  const Inputs in = inputs_of(call);
  const Tensor stats = torch::stable::contiguous(call.stats);
  GradientTensors out(in, call, call.mask, empty_strided);
  elbo_grads(chunked(in.batch), stats.data_ptr(), call.options, call.grad_outputs(), out.gradients, on.stream);
  return out.finish();
}

decltype(std::tuple_cat(FourTensors{}, NineTensors{})) step(const StepCall& call) {
  const OnDevice on(call);
  const Inputs in = inputs_of(call);
  ChunkedBatch batch = chunked(in.batch);
  const Options& options = call.options;
  const OutputTensors out(in, call);
  GradientTensors tensors(in, call, call.mask, empty_strided);
  const Gradients& gradients = tensors.gradients;
  const Number scale = number_of(call.grad_scale, call.grad_scale_value);
  const StepPlan plan = wants_data(gradients) ? elbo_step_plan(batch, options, gradients) : StepPlan{};
  if (plan.fits) {
    const Sums sums(in, batch, false);
    const Tensor workspace = torch::stable::new_empty(in.any(), {plan.data_blocks + 2}, ScalarType::Double);
    elbo_step(
        batch, plan, options, scale, sums.partials, static_cast<double*>(workspace.data_ptr()), out.outputs, gradients,
        on.stream);
  } else if (wants_data(gradients) && elbo_step_each_fits(batch, options, gradients)) {
    const Sums sums(in, batch, true);
    elbo_step_each(batch, options, scale, sums.partials, gradients, on.stream);
    if (options.sigma_mode == kImage) batch.data_chunks = {batch.data.dims, 1, batch.size};
    elbo_finalize(batch, sums.partials, options, out.outputs, on.stream);
    elbo_grads(batch, out.outputs.stats, options, {scale, {}, {}}, small_alone(gradients), on.stream);
  } else {
    run_forward(in, batch, options, out.outputs, on.stream);
    elbo_grads(batch, out.outputs.stats, options, {scale, {}, {}}, gradients, on.stream);
  }
  return std::tuple_cat(out.without_stats(), tensors.finish());
}

Tensor levels(const LevelsCall& call) {
  const OnDevice on(call);
  const Levels in(call);
  const LevelsBatch batch = chunked(in.batch, in.has_double, in.latents);
  const int64_t count = in.batch * batch.partials, stride = 1;
  const Tensor partials = in.empty({&count, 1}, {&stride, 1}), result = in.empty_rates(call.per_level);
  elbo_levels(batch, partials.data_ptr(), result.data_ptr(), call.per_level, on.stream);
  return result;
}

std::vector<Tensor> levels_grads(const LevelsGradsCall& call) {
  const OnDevice on(call);
  const Levels in(call);
  LevelsGradients out(in, call, empty_strided);
  elbo_levels_grads(chunked(in.batch, in.has_double, in.latents), call.grads(), out.of_levels, on.stream);
  return out.finish();
}

std::tuple<Tensor, Tensor> aggregate_sums(const AggregateCall& call) {
  const OnDevice on(call);
  const std::tuple<Tensor, Tensor> sums = call.empty_sums();
  const MixtureOf mixture = call.mixture();
  const AggregateLaunch launch = aggregate_launch(mixture, call.is_double());
  const Tensor workspace = call.empty({launch.workspace()}, {1});
  aggregate(
      mixture, call.is_double(), launch, workspace.data_ptr(), matrix_of(std::get<0>(sums)),
      matrix_of(std::get<1>(sums)), on.stream);
  return sums;
}

AggregateGradsCall::Returned aggregate_gradients(const AggregateGradsCall& call) {
  const OnDevice on(call);
  const AggregateGradsCall::Returned made = call.empty_gradients();
  const MixtureOf mixture = call.mixture();
  const MixtureGradients wanted = call.wanted(made);
  const AggregateGradsLaunches launches = aggregate_grads_launches(mixture, call.is_double(), wanted);
  const Tensor workspace = call.empty({launches.workspace()}, {1});
  aggregate_grads(mixture, call.given(), call.is_double(), launches, workspace.data_ptr(), wanted, on.stream);
  return made;
}

}  // namespace
}  // namespace elbo

// Their schemas are defined in Python, under this name too: which library stands behind fused_elbo's own operators is
// decided there.
STABLE_TORCH_LIBRARY_IMPL(fused_elbo_cuda, ELBO_DISPATCH_KEY, m) {
  m.impl("stats", elbo::Boxed<&elbo::stats>::call);
  m.impl("forward", elbo::Boxed<&elbo::forward>::call);
  m.impl("grads", elbo::Boxed<&elbo::grads>::call);
  m.impl("step", elbo::Boxed<&elbo::step>::call);
  m.impl("levels", elbo::Boxed<&elbo::levels>::call);
  m.impl("levels_grads", elbo::Boxed<&elbo::levels_grads>::call);
  m.impl("aggregate", elbo::Boxed<&elbo::aggregate_sums>::call);
  m.impl("aggregate_grads", elbo::Boxed<&elbo::aggregate_gradients>::call);
}
