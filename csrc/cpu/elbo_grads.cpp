// Stage three: the gradients, each element a factor of its sample times what the formula says, in one pass.
#include "blocks.h"
#include "elbo.h"
#include "latents.h"
#include "results.h"
#include "tasks.h"

namespace elbo {
namespace {

// The same where σ varies inside a sample. `log_sigma(first, n, block)` is given the gradient of a block of log σ where
// no tensor takes it.
template <class A, class F>
void data_gradient_scaled(const Data& data, A w, int64_t sample, int64_t chunk, const Gradients& out, F log_sigma) {
  const Span* const wanted[] = {&out.recon, &out.target, &out.log_sigma};
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    A scratch[3][kBlock];
    const A* r = read(data.recon, sample, first, n, scratch[0]);
    const A* t = read(data.target, sample, first, n, scratch[1]);
    const A* ls = read_log_sigma(*data.log_sigma, sample, first, n, scratch[2]);
    A results[3][kBlock];
    const Vector<A> weight = Vector<A>{} + w;
    const auto lie =
        write_block(wanted, results, sample, first, n, out.past_caches, [&](int64_t i, auto lanes, auto places) {
          const auto g =
              distortion_grad<Vector<A>>(weight, load(r + i, lanes) - load(t + i, lanes), load(ls + i, lanes));
          places.put(0, i, g.recon, lanes);
          places.put(1, i, -g.recon, lanes);
          places.put(2, i, g.log_sigma, lanes);
        });
    if (!out.log_sigma.base) log_sigma(first, n, lie.at[2]);
  });
}

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
template <class A>
void grads_broadcast(int64_t batch, const Data& data, const Weights& weights, const Gradients& out) {
  const Broadcast& log_sigma = *data.log_sigma;
  const bool shared = log_sigma.values.batch_stride == 0;  // by the samples; else each sample is a group
  const int64_t per_sample = chunks(data.dims), tasks = batch * per_sample;
  const int64_t groups = shared ? std::min<int64_t>(tasks, 16) : batch;
  const int64_t width = shared ? log_sigma.numel : log_sigma.numel / batch;
  std::vector<double> sums(groups * width, 0.0);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      double* own = sums.data() + group * width;
      for (int64_t task = tasks * group / groups; task < tasks * (group + 1) / groups; ++task) {
        const int64_t sample = task / per_sample;
        data_gradient_scaled<A>(
            data, static_cast<A>(weights.error[sample]), sample, task % per_sample, out,
            [&](int64_t first, int64_t n, const A* g) { scatter(log_sigma, first, n, g, own); });
      }
    }
  });
  if (out.log_sigma_broadcast == nullptr) return;
  auto& result = *out.log_sigma_broadcast;
  result.assign(log_sigma.numel, 0.0);
  for (int64_t i = 0; i < groups * width; ++i) result[shared ? i % width : i] += sums[i];
}

}  // namespace

template <class A>
void elbo_grads(int64_t batch, const Data& data, const Latents& latents, const Weights& weights, const Gradients& out) {
  const auto error_of = [&](int64_t sample) { return static_cast<A>(weights.error[sample]); };
  const auto plain = [&](int64_t sample, int64_t chunk) {
    chunk_gradient<A>(data, error_of(sample), sample, chunk, out);
  };
  const auto dense = [&](int64_t sample, int64_t chunk) {
    data_gradient_scaled<A>(data, error_of(sample), sample, chunk, out, [](int64_t, int64_t, const A*) {});
  };
  const auto latent_task = [&](int64_t sample, int64_t chunk) {
    (latents.has_prior ? latent_gradient<A, true>
                       : latent_gradient<A, false>)(latents, static_cast<A>(weights.through_loss[sample]),
                                                    static_cast<A>(weights.through_rate[sample]), sample, chunk, out);
  };
  const bool latents_wanted = out.mu.base || out.logvar.base || out.prior_mu.base || out.prior_logvar.base;
  const int64_t latent_dims = latents_wanted ? latents.dims : 0;
  const auto of_latents = each(latent_dims, latent_task);
  const bool data_wanted = out.recon.base || out.target.base || out.log_sigma.base || out.log_sigma_broadcast;
  const bool is_plain = data.log_sigma == nullptr;
  const bool is_broadcast = !is_plain && !data.log_sigma->dense;
  if (data_wanted && is_broadcast) grads_broadcast<A>(batch, data, weights, out);
  if (!data_wanted || is_broadcast) {
    for_shares(batch, 0, latent_dims, nothing, of_latents);
  } else if (is_plain) {
    for_shares(batch, data.dims, latent_dims, each_again(data.dims, plain), of_latents);
  } else {
    for_shares(batch, data.dims, latent_dims, each_again(data.dims, dense), of_latents);
  }
}

template void elbo_grads<float>(int64_t, const Data&, const Latents&, const Weights&, const Gradients&);
template void elbo_grads<double>(int64_t, const Data&, const Latents&, const Weights&, const Gradients&);

}  // namespace elbo
