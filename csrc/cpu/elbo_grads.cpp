// Stage three: the gradients, each element a factor of its sample times what the formula says, in one pass.
#include "blocks.h"
#include "elbo.h"
#include "latents.h"
#include "results.h"
#include "tasks.h"

namespace elbo {
namespace {

// Sums a block of the gradient into those elements of log σ that it came from. In double, for a channel's σ sums over
// every pixel of every image.
template <class A>
void scatter(const Broadcast& log_sigma, int64_t first, int64_t n, const A* g, double* sums) {
  for_runs(log_sigma, first, n, [&](int64_t offset, int64_t done, int64_t length, int64_t stride) {
    if (stride == 0) {
      sums[offset] += sum_lanes<A>(length, [&](int64_t i, auto lanes) { return load(g + done + i, lanes); });
    } else {
      for (int64_t k = 0; k < length; ++k) sums[offset + k * stride] += g[done + k];
    }
  });
}

// log σ is broadcast: tasks are dealt to a fixed number of groups, each with sums of its own, added in order at the
// end.
template <class A, int Q>
void grads_broadcast(const Batch& batch, const std::vector<Factors>& factors, const Gradients& out) {
  const Data& data = batch.data;
  const Broadcast& log_sigma = data.log_sigma;
  const bool shared = log_sigma.values.batch_stride == 0;  // by the samples; else each sample is a group
  const int64_t per_sample = chunks(data.dims), tasks = batch.size * per_sample;
  const int64_t groups = shared ? std::min<int64_t>(tasks, 16) : batch.size;
  int64_t width = 1;  // of log σ: values for a sample
  for (int k = 0; k < log_sigma.rank; ++k) width *= log_sigma.dims[k].size;
  std::vector<double> sums(groups * width, 0.0);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      double* own = sums.data() + group * width;
      for (int64_t task = tasks * group / groups; task < tasks * (group + 1) / groups; ++task) {
        const int64_t sample = task / per_sample;
        element_gradient<A, Q>(
            data, static_cast<A>(factors[sample].recon_scale), sample, task % per_sample, out,
            [&](int64_t first, int64_t n, const A* g) { scatter(log_sigma, first, n, g, own); });
      }
    }
  });
  if (out.log_sigma.base == nullptr) return;
  const int64_t numel = shared ? width : groups * width;
  for (int64_t i = numel; i < groups * width; ++i) sums[i % width] += sums[i];
  convert_to(out.log_sigma, sums.data(), numel);
}

template <class A, int Q>
void grads_of(const Batch& batch, const std::vector<Factors>& factors, const Gradients& out) {
  const Data& data = batch.data;
  const Latents& latents = batch.latents;
  const auto scale_of = [&](int64_t sample) { return static_cast<A>(factors[sample].recon_scale); };
  const auto plain = [&](int64_t sample, int64_t chunk) {
    chunk_gradient<A, Q>(data, scale_of(sample), sample, chunk, out);
  };
  const auto dense = [&](int64_t sample, int64_t chunk) {
    element_gradient<A, Q>(data, scale_of(sample), sample, chunk, out, [](int64_t, int64_t, const A*) {});
  };
  const auto latent_task = [&](int64_t sample, int64_t chunk) {
    const Factors& f = factors[sample];
    latent_gradient_of<A>(latents)(
        latents, static_cast<A>(f.grad_kl_clamped), static_cast<A>(f.grad_kl), sample, chunk, out);
  };
  const int64_t latent_dims = wants_latents(out) ? latents.dims : 0;
  const auto of_latents = each(latent_dims, latent_task);
  const bool is_broadcast = data.has_log_sigma && data.log_sigma.rank > 0;
  const bool data_wanted = wants_data(out) || (is_broadcast && out.log_sigma.base);
  if (data_wanted && is_broadcast) grads_broadcast<A, Q>(batch, factors, out);
  if (!data_wanted || is_broadcast) {
    for_shares(batch.size, 0, latent_dims, nothing, of_latents);
  } else if (!has_elements(data) && !has_factors(data)) {
    for_shares(batch.size, data.dims, latent_dims, each_again(data.dims, plain), of_latents);
  } else {
    for_shares(batch.size, data.dims, latent_dims, each_again(data.dims, dense), of_latents);
  }
}

}  // namespace

template <class A>
void elbo_grads(const Batch& batch, const std::vector<Factors>& factors, const Gradients& out) {
  (batch.data.exponent == 2 ? grads_of<A, 2> : grads_of<A, 1>)(batch, factors, out);
}

template void elbo_grads<float>(const Batch&, const std::vector<Factors>&, const Gradients&);
template void elbo_grads<double>(const Batch&, const std::vector<Factors>&, const Gradients&);

}  // namespace elbo
