// The operators of fused_elbo/operators/elbo.py for CUDA tensors, against LibTorch's stable ABI: tensors in, plain structures to
// the launch functions, tensors out. Arguments were validated in Python; the order of arguments is the schema's.
// Nothing here waits for the device or reads a value from it.
#include "../errors.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "outputs.h"

#ifndef ELBO_DISPATCH_KEY
#define ELBO_DISPATCH_KEY CUDA
#endif

namespace elbo {
namespace {

// The device of the tensors as the current one, and the stream that PyTorch has for it.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;

  explicit OnDevice(const Tensor& t) : guard(t.get_device()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

Number number_of(const OptTensor& t, double value) {
  if (!t) return {{}, value};
  const int64_t stride = t->numel() == 1 ? 0 : t->stride(0);
  return {span_of(*t, stride), 0};
}

struct Values {
  int64_t sigma_mode;
  bool softclip;
  double log_sigma_value, min_log_sigma, free_bits, beta_value;
  std::optional<double> capacity_value;
  int64_t reduction;
};

Knobs knobs_of(const OptTensor& log_sigma, const OptTensor& beta, const OptTensor& capacity, const Values& values) {
  Knobs knobs;
  knobs.sigma_mode = values.sigma_mode;
  knobs.softclip = values.softclip;
  knobs.log_sigma = number_of(values.sigma_mode == kGiven ? log_sigma : std::nullopt, values.log_sigma_value);
  knobs.min_log_sigma = values.min_log_sigma;
  knobs.beta = number_of(beta, values.beta_value);
  knobs.has_capacity = capacity || values.capacity_value;
  knobs.capacity = number_of(capacity, values.capacity_value.value_or(0));
  knobs.reduction = values.reduction;
  return knobs;
}

OptTensor element_sigma(const OptTensor& log_sigma, int64_t sigma_mode) {
  return sigma_mode == kElement ? log_sigma : std::nullopt;
}

// Stages one and two.
void run_forward(const Inputs& in, const Knobs& knobs, const Outputs& outputs, cudaStream_t stream) {
  const Sums sums(in, true);
  elbo_stats(in.batch, sums.partials, stream);
  elbo_finalize(in.batch, sums.partials, knobs, outputs, stream);
}

// ------------------------------------------------------------------------------------------------------- operators

Tensor stats(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor, OptTensor, int64_t sigma_mode, bool, double, double, double free_bits, double,
    std::optional<double>, int64_t) {
  const OnDevice on(recon ? *recon : *mu);
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  Tensor result = empty(in, {3, in.batch.size + 1});
  Outputs outputs;
  outputs.stats = result.data_ptr();
  run_forward(in, Knobs{}, outputs, on.stream);
  return result;
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors forward(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor beta, OptTensor capacity, int64_t sigma_mode, bool softclip,
    double log_sigma_value, double min_log_sigma, double free_bits, double beta_value,
    std::optional<double> capacity_value, int64_t reduction) {
  const OnDevice on(recon ? *recon : *mu);
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  const Values values = {sigma_mode, softclip,   log_sigma_value, min_log_sigma,
                         free_bits,  beta_value, capacity_value,  reduction};
  const Knobs knobs = knobs_of(log_sigma, beta, capacity, values);
  const ForLoss out(in, log_sigma, knobs);
  run_forward(in, knobs, out.outputs, on.stream);
  return {out.loss, out.distortion, out.rate, out.sigma, out.stats};
}

bool unequal(const OptTensor& grad_output) {
  return grad_output && grad_output->numel() > 1 && grad_output->stride(0) != 0;
}

EightTensors grads(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor beta, OptTensor capacity, int64_t sigma_mode, bool softclip,
    double log_sigma_value, double min_log_sigma, double free_bits, double beta_value,
    std::optional<double> capacity_value, int64_t reduction, Tensor stats, OptTensor grad_loss,
    OptTensor grad_distortion, OptTensor grad_rate, int64_t mask) {
  const OnDevice on(recon ? *recon : *mu);
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  const Values values = {sigma_mode, softclip,   log_sigma_value, min_log_sigma,
                         free_bits,  beta_value, capacity_value,  reduction};
  const GradOutputs grad_outputs = {
      number_of(grad_loss, 0), number_of(grad_distortion, 0), number_of(grad_rate, 0),
      !unequal(grad_loss) && !unequal(grad_distortion)};
  const Tensor dense = torch::stable::contiguous(stats);
  const Knobs knobs = knobs_of(log_sigma, beta, capacity, values);
  ForGradients out(in, knobs, {recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, mask});
  elbo_grads(in.batch, dense.data_ptr(), knobs, grad_outputs, out.gradients, on.stream);
  return out.finish();
}

using TwelveTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TwelveTensors step(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor beta, OptTensor capacity, int64_t sigma_mode, bool softclip,
    double log_sigma_value, double min_log_sigma, double free_bits, double beta_value,
    std::optional<double> capacity_value, int64_t reduction, OptTensor grad_scale, double grad_scale_value,
    int64_t mask) {
  const OnDevice on(recon ? *recon : *mu);
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  const Values values = {sigma_mode, softclip,   log_sigma_value, min_log_sigma,
                         free_bits,  beta_value, capacity_value,  reduction};
  const Knobs knobs = knobs_of(log_sigma, beta, capacity, values);
  const ForLoss loss(in, log_sigma, knobs);
  ForGradients gradients(in, knobs, {recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, mask});
  const Number scale = number_of(grad_scale, grad_scale_value);
  const GradOutputs grad_outputs = {scale, {}, {}, true};
  const StepPlan plan = wants_data(gradients.gradients) ? elbo_step_plan(in.batch, knobs) : StepPlan{};
  if (plan.fits) {
    const Sums sums(in, false);
    const Tensor workspace = torch::stable::new_empty(in.any(), {plan.data_blocks + 2}, ScalarType::Double);
    elbo_step(
        in.batch, plan, knobs, scale, sums.partials, static_cast<double*>(workspace.data_ptr()), loss.outputs,
        gradients.gradients, on.stream);
  } else if (wants_data(gradients.gradients) && elbo_step_each_fits(in.batch, knobs)) {
    const Sums sums(in, true);
    Batch batch = in.batch;
    elbo_step_each(batch, knobs, scale, sums.partials, gradients.gradients, on.stream);
    if (sigma_mode == kImage) batch.data.pieces = {batch.data.dims, 1, batch.size};
    elbo_finalize(batch, sums.partials, knobs, loss.outputs, on.stream);
    elbo_grads(batch, loss.outputs.stats, knobs, grad_outputs, small_alone(gradients.gradients), on.stream);
  } else {
    run_forward(in, knobs, loss.outputs, on.stream);
    elbo_grads(in.batch, loss.outputs.stats, knobs, grad_outputs, gradients.gradients, on.stream);
  }
  return std::tuple_cat(std::make_tuple(loss.loss, loss.distortion, loss.rate, loss.sigma), gradients.finish());
}

}  // namespace
}  // namespace elbo

// The schemas are fused_elbo/operators/elbo.py's, defined there under this name too: which library stands behind
// fused_elbo's own operators is decided in Python.
STABLE_TORCH_LIBRARY_IMPL(fused_elbo_cuda, ELBO_DISPATCH_KEY, m) {
  m.impl("stats", TORCH_BOX(&elbo::stats));
  m.impl("forward", TORCH_BOX(&elbo::forward));
  m.impl("grads", TORCH_BOX(&elbo::grads));
  m.impl("step", TORCH_BOX(&elbo::step));
}
