// The operators of fused_elbo/ops.py for CUDA tensors, against LibTorch's stable ABI: tensors in, plain structures to
// the launch functions, tensors out. Arguments were validated in Python; the order of arguments is the schema's.
// Nothing here waits for the device or reads a value from it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "inputs.h"

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
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

Tensor empty(const Inputs& in, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(in.any(), sizes, in.dtype());
}

Tensor nothing(const Inputs& in) {
  return torch::stable::new_empty(in.any(), {0}, ScalarType::Float);
}

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

// Stages one and two. The tensors of `outputs` are made by the caller.
void run_forward(const Inputs& in, const Knobs& knobs, const Outputs& outputs, cudaStream_t stream) {
  const Batch& batch = in.batch;
  std::optional<Tensor> s, kl, clamped;
  const auto partials = [&](std::optional<Tensor>& t, const Pieces& pieces) {
    t = empty(in, {pieces.count});
    return t->data_ptr();
  };
  Partials sums;
  if (batch.data.dims) sums.s = partials(s, batch.data.pieces);
  if (batch.latents.dims) {
    sums.kl = partials(kl, batch.latents.pieces);
    sums.clamped = batch.latents.free_bits > 0 ? partials(clamped, batch.latents.pieces) : sums.kl;
  }
  elbo_stats(batch, sums, stream);
  elbo_finalize(batch, sums, knobs, outputs, stream);
}

// ------------------------------------------------------------------------------------------------------- operators

Tensor stats(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, double free_bits) {
  const OnDevice on(recon ? *recon : *mu);
  const Inputs in(recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, free_bits);
  Tensor result = empty(in, {3, in.batch.size + 1});
  Outputs outputs;
  outputs.stats = result.data_ptr();
  run_forward(in, Knobs{}, outputs, on.stream);
  return result;
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors forward_of(const Inputs& in, const OptTensor& log_sigma, const Knobs& knobs, cudaStream_t stream) {
  const std::vector<int64_t> each = {in.batch.size}, one;
  const auto& shape = knobs.reduction == kNone ? each : one;
  Tensor loss = empty(in, shape), distortion = empty(in, shape), rate = empty(in, shape);
  Tensor stats = empty(in, {3, in.batch.size + 1});
  std::vector<int64_t> sigma_shape;
  if (knobs.sigma_mode == kElement) sigma_shape = {0};
  if (knobs.sigma_mode == kImage) sigma_shape = each;
  if (knobs.sigma_mode == kGiven && log_sigma && log_sigma->dim() == 1) sigma_shape = {log_sigma->size(0)};
  Tensor sigma = empty(in, sigma_shape);
  run_forward(
      in, knobs,
      {loss.data_ptr(), distortion.data_ptr(), rate.data_ptr(), sigma.data_ptr(), sigma.numel() > 1, stats.data_ptr()},
      stream);
  return {loss, distortion, rate, sigma, stats};
}

FiveTensors forward(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor beta, OptTensor capacity, int64_t sigma_mode, bool softclip,
    double log_sigma_value, double min_log_sigma, double free_bits, double beta_value,
    std::optional<double> capacity_value, int64_t reduction) {
  const OnDevice on(recon ? *recon : *mu);
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  const Values values = {sigma_mode, softclip,   log_sigma_value, min_log_sigma,
                         free_bits,  beta_value, capacity_value,  reduction};
  return forward_of(in, log_sigma, knobs_of(log_sigma, beta, capacity, values), on.stream);
}

// The tensors as the schema has them, in the order of the mask's bits.
struct Wanted {
  const OptTensor &recon, &target, &mu, &logvar, &log_sigma, &prior_mu, &prior_logvar, &beta;
  int64_t mask;

  enum Bit { kRecon, kTarget, kMu, kLogvar, kLogSigma, kPriorMu, kPriorLogvar, kBeta };

  bool has(Bit bit) const {
    return (mask >> bit & 1) != 0;
  }
};

EightTensors grads_of(
    const Inputs& in, const Wanted& wanted, const void* stats, const Knobs& knobs, const GradOutputs& grad_outputs,
    cudaStream_t stream) {
  std::optional<Output> outputs[Wanted::kBeta + 1];
  std::optional<Tensor> small[Wanted::kBeta + 1];
  const auto output = [&](Wanted::Bit bit, const OptTensor& input, const Tensor& lead, ScalarType written) {
    if (!wanted.has(bit)) return Span{};
    outputs[bit].emplace(*input, lead, written);
    return span_of(outputs[bit]->buffer);
  };
  const auto of_batch = [&](Wanted::Bit bit, const OptTensor& input, bool& each) {
    if (!wanted.has(bit)) return Span{};
    small[bit] = torch::stable::empty_like(*input);
    each = small[bit]->numel() > 1;
    return span_of(*small[bit], each ? 1 : 0);
  };

  Gradients out;
  const ScalarType of_recon = in.batch.data.recon.dtype, of_target = in.batch.data.target.dtype;
  out.recon = output(Wanted::kRecon, wanted.recon, in.recon, of_recon);
  out.target = output(Wanted::kTarget, wanted.target, in.recon, of_target);
  const auto latent = [&](Wanted::Bit bit, const OptTensor& input) {
    return output(bit, input, in.mu, input ? input->scalar_type() : ScalarType::Float);
  };
  out.mu = latent(Wanted::kMu, wanted.mu);
  out.logvar = latent(Wanted::kLogvar, wanted.logvar);
  out.prior_mu = latent(Wanted::kPriorMu, wanted.prior_mu);
  out.prior_logvar = latent(Wanted::kPriorLogvar, wanted.prior_logvar);
  std::optional<Tensor> of_elements;  // where one log σ has many elements: the gradient of each, to be summed
  if (knobs.sigma_mode != kElement) {
    out.log_sigma = of_batch(Wanted::kLogSigma, wanted.log_sigma, out.log_sigma_each);
  } else if (wanted.has(Wanted::kLogSigma) && in.log_sigma_is_broadcast) {
    of_elements = empty_in_order(in.recon, in.dtype());
    out.element_log_sigma = span_of(*of_elements);
  } else {
    out.element_log_sigma = output(Wanted::kLogSigma, wanted.log_sigma, in.recon, of_target);
  }
  out.beta = of_batch(Wanted::kBeta, wanted.beta, out.beta_each);
  elbo_grads(in.batch, stats, knobs, grad_outputs, out, stream);

  if (of_elements) small[Wanted::kLogSigma] = summed_like(*of_elements, *wanted.log_sigma);
  const auto result = [&](Wanted::Bit bit) {
    return outputs[bit] ? outputs[bit]->finish() : small[bit] ? *small[bit] : nothing(in);
  };
  return {result(Wanted::kRecon),    result(Wanted::kTarget),  result(Wanted::kMu),          result(Wanted::kLogvar),
          result(Wanted::kLogSigma), result(Wanted::kPriorMu), result(Wanted::kPriorLogvar), result(Wanted::kBeta)};
}

bool unequal(const OptTensor& grad_output) {
  return grad_output && grad_output->numel() > 1 && grad_output->stride(0) != 0;
}

EightTensors grads(
    OptTensor grad_loss, OptTensor grad_distortion, OptTensor grad_rate, OptTensor recon, OptTensor target,
    OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu, OptTensor prior_logvar, OptTensor beta,
    OptTensor capacity, Tensor stats, int64_t sigma_mode, bool softclip, double log_sigma_value, double min_log_sigma,
    double free_bits, double beta_value, std::optional<double> capacity_value, int64_t reduction, int64_t mask) {
  const OnDevice on(recon ? *recon : *mu);
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  const Values values = {sigma_mode, softclip,   log_sigma_value, min_log_sigma,
                         free_bits,  beta_value, capacity_value,  reduction};
  const GradOutputs grad_outputs = {
      number_of(grad_loss, 0), number_of(grad_distortion, 0), number_of(grad_rate, 0),
      !unequal(grad_loss) && !unequal(grad_distortion)};
  const Tensor dense = torch::stable::contiguous(stats);
  return grads_of(
      in, {recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, mask}, dense.data_ptr(),
      knobs_of(log_sigma, beta, capacity, values), grad_outputs, on.stream);
}

using TwelveTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TwelveTensors step(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor beta, OptTensor capacity, OptTensor grad_scale, int64_t sigma_mode, bool softclip,
    double log_sigma_value, double min_log_sigma, double free_bits, double beta_value,
    std::optional<double> capacity_value, int64_t reduction, double grad_scale_value, int64_t mask) {
  const OnDevice on(recon ? *recon : *mu);
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  const Values values = {sigma_mode, softclip,   log_sigma_value, min_log_sigma,
                         free_bits,  beta_value, capacity_value,  reduction};
  const Knobs knobs = knobs_of(log_sigma, beta, capacity, values);
  const auto [loss, distortion, rate, sigma, stats] = forward_of(in, log_sigma, knobs, on.stream);
  const GradOutputs grad_outputs = {number_of(grad_scale, grad_scale_value), {}, {}, true};
  return std::tuple_cat(
      std::make_tuple(loss, distortion, rate, sigma),
      grads_of(
          in, {recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, mask}, stats.data_ptr(), knobs,
          grad_outputs, on.stream));
}

}  // namespace
}  // namespace elbo

#define ELBO_INPUTS                                                                                          \
  "Tensor? recon, Tensor? target, Tensor? mu, Tensor? logvar, Tensor? log_sigma, Tensor? prior_mu, Tensor? " \
  "prior_logvar"
#define ELBO_KNOBS "Tensor? beta, Tensor? capacity"
#define ELBO_VALUES                                                                              \
  "int sigma_mode, bool softclip, float log_sigma_value, float min_log_sigma, float free_bits, " \
  "float beta_value, float? capacity_value, int reduction"
#define ELBO_EIGHT "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"

// As in fused_elbo/ops.py, under a name of its own: which library stands behind fused_elbo's operators is decided
// there.
STABLE_TORCH_LIBRARY(fused_elbo_cuda, m) {
  m.def("stats(" ELBO_INPUTS ", float free_bits) -> Tensor");
  m.def("forward(" ELBO_INPUTS ", " ELBO_KNOBS ", " ELBO_VALUES ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "grads(Tensor? grad_loss, Tensor? grad_distortion, Tensor? grad_rate, " ELBO_INPUTS ", " ELBO_KNOBS
      ", Tensor stats, " ELBO_VALUES ", int mask) -> (" ELBO_EIGHT ")");
  m.def(
      "step(" ELBO_INPUTS ", " ELBO_KNOBS ", Tensor? grad_scale, " ELBO_VALUES
      ", float grad_scale_value, int mask) -> (Tensor, Tensor, Tensor, Tensor, " ELBO_EIGHT ")");
}

STABLE_TORCH_LIBRARY_IMPL(fused_elbo_cuda, ELBO_DISPATCH_KEY, m) {
  m.impl("stats", TORCH_BOX(&elbo::stats));
  m.impl("forward", TORCH_BOX(&elbo::forward));
  m.impl("grads", TORCH_BOX(&elbo::grads));
  m.impl("step", TORCH_BOX(&elbo::step));
}
