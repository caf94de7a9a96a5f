// The operators of fused_elbo/operators/elbo.py for CPU tensors, against LibTorch's stable ABI: tensors in, plain structures to
// the kernels, tensors out. Arguments were validated in Python; the order of arguments is the schema's.
#include "../errors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <deque>
#include <numeric>
#include <optional>
#include <tuple>

#include "elbo.h"
#include "layout.h"

namespace elbo {

void register_operators(torch::stable::detail::StableLibrary& m);  // called by library.cpp, for one instruction set

namespace {

using OptTensor = std::optional<Tensor>;

// The values of a 0-d or 1-D tensor, few enough to hold as doubles; none if there is no tensor.
std::vector<double> values_of(const OptTensor& t) {
  if (!t) return {};
  const int64_t n = t->dim() == 0 ? 1 : t->size(0);
  const Span span{
      static_cast<char*>(t->data_ptr()), t->scalar_type(), static_cast<int64_t>(t->element_size()),
      t->dim() == 0 ? 0 : t->stride(0)};
  std::vector<double> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = *read<double>(span, i, 0, 1, &values[i]);
  return values;
}

Tensor tensor_of(
    const std::vector<double>& values, const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t k = sizes.size(); k-- > 1;) strides[k - 1] = strides[k] * sizes[k];
  const Tensor t = empty_strided(sizes, strides, dtype, like);
  const Span span{static_cast<char*>(t.data_ptr()), dtype, static_cast<int64_t>(t.element_size()), 0};
  if (!values.empty()) {
    double* direct = write_to<double>(span, 0, 0, nullptr);
    if (direct) std::copy(values.begin(), values.end(), direct);
    written(span, 0, 0, static_cast<int64_t>(values.size()), values.data());
  }
  return t;
}

// The tensors of a call, in an order in which they can be walked together, kept alive beside what the kernels see.
struct Inputs {
  Tensor recon, target, mu, logvar, prior_mu, prior_logvar, log_sigma;
  Data data;
  Latents latents;
  Broadcast element_sigma;
  int64_t batch = 0;
  bool is_double = false;

  Inputs(
      const OptTensor& r, const OptTensor& t, const OptTensor& m, const OptTensor& l,
      const OptTensor& element_log_sigma, const OptTensor& p_m, const OptTensor& p_l, double free_bits) {
    for (const OptTensor* x : {&r, &t, &m, &l}) is_double |= *x && (*x)->scalar_type() == ScalarType::Double;
    if (r) {
      batch = r->size(0);
      recon = leader(*r);
      target = in_order_of(*t, recon);
      data.dims = sample_size(recon);
      data.recon = span_of(recon);
      data.target = span_of(target);
    }
    if (r && element_log_sigma) {
      const bool full = element_log_sigma->numel() == recon.numel();
      const auto copy = [&] { return torch::stable::contiguous(*element_log_sigma); };
      log_sigma = full ? in_order_of(*element_log_sigma, recon) : as_large_as(*element_log_sigma, copy);
      element_sigma = broadcast(log_sigma, recon);
      data.log_sigma = &element_sigma;
    }
    if (m) {
      batch = m->size(0);
      mu = leader(*m);
      logvar = in_order_of(*l, mu);
      latents.dims = sample_size(mu);
      latents.mu = span_of(mu);
      latents.logvar = span_of(logvar);
      if (free_bits > 0) latents.free_bits = free_bits;
    }
    if (m && p_m) {
      prior_mu = in_order_of(*p_m, mu);
      prior_logvar = in_order_of(*p_l, mu);
      latents.has_prior = true;
      latents.prior_mu = span_of(prior_mu);
      latents.prior_logvar = span_of(prior_logvar);
    }
  }

  Inputs(const Inputs&) = delete;  // data points into it

  ScalarType dtype() const {
    return is_double ? ScalarType::Double : ScalarType::Float;
  }

  // A number as it would come in a tensor of the dtype that is computed in.
  double rounded(double value) const {
    return is_double ? value : static_cast<float>(value);
  }

  const Tensor& any() const {
    return data.dims ? recon : mu;
  }
};

Tensor run_stats(const Inputs& in) {
  const Stats stats = (in.is_double ? elbo_stats<double> : elbo_stats<float>)(in.batch, in.data, in.latents);
  std::vector<double> rows;  // the samples, then their sum
  for (const auto* row : {&stats.s, &stats.kl, &stats.kl_clamped}) {
    rows.insert(rows.end(), row->begin(), row->end());
    rows.push_back(std::accumulate(row->begin(), row->end(), 0.0));
  }
  return tensor_of(rows, {3, in.batch + 1}, in.dtype(), in.any());
}

// What forward hands on and grads reads, so that both see the same rounded numbers.
Stats read_stats(const Tensor& stats) {
  const Span span{
      static_cast<char*>(stats.data_ptr()), stats.scalar_type(), static_cast<int64_t>(stats.element_size()),
      stats.stride(0)};
  const int64_t batch = stats.size(1) - 1;
  const auto row = [&](int64_t k) {
    std::vector<double> values(batch);
    const double* direct = read<double>(span, k, 0, batch, values.data());
    if (direct != values.data()) std::copy_n(direct, batch, values.data());
    return values;
  };
  return {row(0), row(1), row(2)};
}

Knobs knobs_of(
    const OptTensor& log_sigma, const OptTensor& beta, const OptTensor& capacity, int64_t sigma_mode, bool softclip,
    double log_sigma_value, double min_log_sigma, double beta_value, std::optional<double> capacity_value,
    int64_t reduction) {
  Knobs knobs{sigma_mode, softclip, log_sigma_value, min_log_sigma, beta_value, capacity_value, reduction, {}, {}};
  if (capacity) knobs.capacity = values_of(capacity)[0];
  if (sigma_mode == kGiven) knobs.log_sigma = values_of(log_sigma);
  knobs.beta = values_of(beta);
  return knobs;
}

OptTensor element_sigma(const OptTensor& log_sigma, int64_t sigma_mode) {
  return sigma_mode == kElement ? log_sigma : std::nullopt;
}

// loss, distortion, rate, sigma
std::tuple<Tensor, Tensor, Tensor, Tensor> tensors_of(
    const Outputs& out, const Inputs& in, const OptTensor& log_sigma, int64_t sigma_mode, int64_t reduction) {
  const auto made = [&](const std::vector<double>& values, bool per_sample) {
    const std::vector<int64_t> sizes =
        per_sample ? std::vector<int64_t>{static_cast<int64_t>(values.size())} : std::vector<int64_t>{};
    return tensor_of(values, sizes, in.dtype(), in.any());
  };
  const bool each = reduction == kNone;
  const bool sigma_each = sigma_mode == kImage || sigma_mode == kElement || (log_sigma && log_sigma->dim() == 1);
  return {made(out.loss, each), made(out.distortion, each), made(out.rate, each), made(out.sigma, sigma_each)};
}

// ------------------------------------------------------------------------------------------------------- operators

Tensor stats(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor, OptTensor, int64_t sigma_mode, bool, double, double, double free_bits, double,
    std::optional<double>, int64_t) {
  return run_stats(
      Inputs(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor beta, OptTensor capacity, int64_t sigma_mode, bool softclip,
    double log_sigma_value, double min_log_sigma, double free_bits, double beta_value,
    std::optional<double> capacity_value, int64_t reduction) {
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  const Tensor stats = run_stats(in);
  const Knobs knobs = knobs_of(
      log_sigma, beta, capacity, sigma_mode, softclip, log_sigma_value, min_log_sigma, beta_value, capacity_value,
      reduction);
  const Outputs out = elbo_finalize(read_stats(stats), in.data.dims, in.latents.dims, knobs);
  return std::tuple_cat(tensors_of(out, in, log_sigma, sigma_mode, reduction), std::make_tuple(stats));
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The gradients that `mask` asks for: memory for the kernels to write to, then the tensors to return.
class Results {
 public:
  Gradients spans;

  Results(
      const Inputs& in, const OptTensor& recon, const OptTensor& target, const OptTensor& mu, const OptTensor& logvar,
      const OptTensor& log_sigma, const OptTensor& prior_mu, const OptTensor& prior_logvar, const OptTensor& beta,
      int64_t sigma_mode, int64_t mask)
      : in_(in), log_sigma_(log_sigma), beta_(beta), element_(sigma_mode == kElement), mask_(mask) {
    spans.recon = output(kRecon, recon, in.recon);
    spans.target = output(kTarget, target, in.recon);
    spans.mu = output(kMu, mu, in.mu);
    spans.logvar = output(kLogvar, logvar, in.mu);
    spans.prior_mu = output(kPriorMu, prior_mu, in.mu);
    spans.prior_logvar = output(kPriorLogvar, prior_logvar, in.mu);
    if (element_ && in.element_sigma.dense) {
      spans.log_sigma = output(kLogSigma, log_sigma, in.recon);
    } else if (element_ && wanted(kLogSigma)) {
      spans.log_sigma_broadcast = &log_sigma_sums_;
    }
    int64_t bytes = 0;  // of the gradients that are as large as the data
    for (const Span* span : {&spans.recon, &spans.target, &spans.log_sigma}) {
      if (span->base) bytes += in.recon.numel() * span->itemsize;
    }
    spans.past_caches = passes_caches(bytes);
  }

  Results(const Results&) = delete;  // spans points into it

  EightTensors finish(const Weights& weights) {
    const Tensor of_log_sigma = outputs_[kLogSigma]
                                    ? large(kLogSigma)
                                    : small(kLogSigma, log_sigma_, element_ ? log_sigma_sums_ : weights.log_sigma);
    return {large(kRecon), large(kTarget),  large(kMu),          large(kLogvar),
            of_log_sigma,  large(kPriorMu), large(kPriorLogvar), small(kBeta, beta_, weights.beta)};
  }

 private:
  enum Bit { kRecon, kTarget, kMu, kLogvar, kLogSigma, kPriorMu, kPriorLogvar, kBeta };

  bool wanted(Bit bit) const {
    return (mask_ >> bit & 1) != 0;
  }

  Tensor none() const {
    const int64_t size = 0, stride = 1;
    return empty_strided({&size, 1}, {&stride, 1}, ScalarType::Float, in_.any());
  }

  Span output(Bit bit, const OptTensor& input, const Tensor& lead) {
    if (!wanted(bit)) return {};
    outputs_[bit].emplace(*input, lead, input->scalar_type(), empty_pooled);
    return span_of(outputs_[bit]->buffer);
  }

  Tensor large(Bit bit) {
    return outputs_[bit] ? outputs_[bit]->finish() : none();
  }

  // Small gradients are made contiguous and copied, for empty_like's strides may be others.
  Tensor small(Bit bit, const OptTensor& input, const std::vector<double>& values) const {
    if (!wanted(bit)) return none();
    const auto sizes = input->sizes();
    Tensor result = torch::stable::empty_like(*input);
    torch::stable::copy_(result, tensor_of(values, {sizes.begin(), sizes.end()}, input->scalar_type(), *input));
    return result;
  }

  const Inputs& in_;
  const OptTensor& log_sigma_;
  const OptTensor& beta_;
  const bool element_;
  const int64_t mask_;
  std::optional<Output> outputs_[kBeta + 1];
  std::vector<double> log_sigma_sums_;
};

EightTensors grads(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor beta, OptTensor capacity, int64_t sigma_mode, bool softclip,
    double log_sigma_value, double min_log_sigma, double free_bits, double beta_value,
    std::optional<double> capacity_value, int64_t reduction, Tensor stats, OptTensor grad_loss,
    OptTensor grad_distortion, OptTensor grad_rate, int64_t mask) {
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  const Knobs knobs = knobs_of(
      log_sigma, beta, capacity, sigma_mode, softclip, log_sigma_value, min_log_sigma, beta_value, capacity_value,
      reduction);
  const Weights weights = elbo_weights(
      read_stats(stats), in.data.dims, in.latents.dims, knobs,
      {values_of(grad_loss), values_of(grad_distortion), values_of(grad_rate)});
  Results results(in, recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, sigma_mode, mask);
  (in.is_double ? elbo_grads<double> : elbo_grads<float>)(in.batch, in.data, in.latents, weights, results.spans);
  return results.finish(weights);
}

using TwelveTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TwelveTensors step(
    OptTensor recon, OptTensor target, OptTensor mu, OptTensor logvar, OptTensor log_sigma, OptTensor prior_mu,
    OptTensor prior_logvar, OptTensor beta, OptTensor capacity, int64_t sigma_mode, bool softclip,
    double log_sigma_value, double min_log_sigma, double free_bits, double beta_value,
    std::optional<double> capacity_value, int64_t reduction, OptTensor grad_scale, double grad_scale_value,
    int64_t mask) {
  const Inputs in(recon, target, mu, logvar, element_sigma(log_sigma, sigma_mode), prior_mu, prior_logvar, free_bits);
  const Knobs knobs = knobs_of(
      log_sigma, beta, capacity, sigma_mode, softclip, log_sigma_value, min_log_sigma, beta_value, capacity_value,
      reduction);
  const double scale = grad_scale ? values_of(grad_scale)[0] : in.rounded(grad_scale_value);
  Results results(in, recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, sigma_mode, mask);
  const Step step =
      (in.is_double ? elbo_step<double> : elbo_step<float>)(in.batch, in.data, in.latents, knobs, scale, results.spans);
  const Outputs out = elbo_finalize(step.stats, in.data.dims, in.latents.dims, knobs);
  return std::tuple_cat(tensors_of(out, in, log_sigma, sigma_mode, reduction), results.finish(step.weights));
}

// ---------------------------------------------------------------------------------------------- a hierarchy's levels

// mu, logvar, prior_mu and prior_logvar of each level, in an order in which they can be walked together.
class Levels {
 public:
  std::vector<Latents> latents;
  int64_t batch;
  bool is_double = false;

  Levels(const std::vector<OptTensor>& tensors, double free_bits) {
    for (size_t i = 0; i < tensors.size(); i += 4) {
      const OptTensor none;
      inputs_.emplace_back(none, none, tensors[i], tensors[i + 1], none, tensors[i + 2], tensors[i + 3], free_bits);
      latents.push_back(inputs_.back().latents);
      for (size_t k = i; k < i + 4; ++k) is_double |= tensors[k] && tensors[k]->scalar_type() == ScalarType::Double;
    }
    batch = inputs_.front().batch;
  }

  const Tensor& mu(size_t level) const {
    return inputs_[level].mu;
  }

 private:
  std::deque<Inputs> inputs_;  // which stay where they are
};

Tensor levels(std::vector<OptTensor> tensors, double free_bits) {
  const Levels in(tensors, free_bits);
  const auto sums = (in.is_double ? elbo_levels<double> : elbo_levels<float>)(in.batch, in.latents);
  return tensor_of(sums, {in.batch}, in.is_double ? ScalarType::Double : ScalarType::Float, in.mu(0));
}

std::vector<Tensor> levels_grads(
    std::vector<OptTensor> tensors, double free_bits, Tensor grad, std::vector<int64_t> wanted) {
  const Levels in(tensors, free_bits);
  std::vector<Gradients> spans(in.latents.size());
  std::deque<Output> outputs;
  int64_t bytes = 0;
  for (int64_t i : wanted) bytes += tensors[i]->numel() * tensors[i]->element_size();
  for (Gradients& level : spans) level.latents_past_caches = passes_caches(bytes);
  for (int64_t i : wanted) {
    outputs.emplace_back(*tensors[i], in.mu(i / 4), tensors[i]->scalar_type(), empty_pooled);
    Gradients& level = spans[i / 4];
    Span* const of_level[] = {&level.mu, &level.logvar, &level.prior_mu, &level.prior_logvar};
    *of_level[i % 4] = span_of(outputs.back().buffer);
  }
  (in.is_double ? elbo_levels_grads<double> : elbo_levels_grads<float>)(in.batch, in.latents, values_of(grad), spans);
  std::vector<Tensor> results;
  for (Output& output : outputs) results.push_back(output.finish());
  return results;
}

}  // namespace

void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("stats", TORCH_BOX(&stats));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("grads", TORCH_BOX(&grads));
  m.impl("step", TORCH_BOX(&step));
  m.impl("levels", TORCH_BOX(&levels));
  m.impl("levels_grads", TORCH_BOX(&levels_grads));
}

}  // namespace elbo
