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
  const Span* const wanted[] = {&out.recon, &out.target, &out.element_log_sigma};
  for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
    A scratch[3][kBlock];
    const A* r = read(data.recon, sample, first, n, scratch[0]);
    const A* t = read(data.target, sample, first, n, scratch[1]);
    const A* ls = read_log_sigma(data.log_sigma, sample, first, n, scratch[2]);
    A results[3][kBlock];
    const Vector<A> weight = Vector<A>{} + w;
    const auto lie =
        write_block(wanted, results, sample, first, n, out.past_caches, [&](int64_t i, auto lanes, auto places) {
          const Vector<A> e = difference(load(r + i, lanes), load(t + i, lanes));
          const auto g = distortion_grad<Vector<A>>(weight, e, load(ls + i, lanes));
          places.put(0, i, g.recon, lanes);
          places.put(1, i, -g.recon, lanes);
          places.put(2, i, g.log_sigma, lanes);
        });
    if (!out.element_log_sigma.base) log_sigma(first, n, lie.at[2]);
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
        data_gradient_scaled<A>(
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

}  // namespace

template <class A>
void elbo_grads(const Batch& batch, const std::vector<Factors>& factors, const Gradients& out) {
  const Data& data = batch.data;
  const Latents& latents = batch.latents;
  const auto scale_of = [&](int64_t sample) { return static_cast<A>(factors[sample].recon_scale); };
  const auto plain = [&](int64_t sample, int64_t chunk) {
    chunk_gradient<A>(data, scale_of(sample), sample, chunk, out);
  };
  const auto dense = [&](int64_t sample, int64_t chunk) {
    data_gradient_scaled<A>(data, scale_of(sample), sample, chunk, out, [](int64_t, int64_t, const A*) {});
  };
  const auto latent_task = [&](int64_t sample, int64_t chunk) {
    (latents.has_prior ? latent_gradient<A, true>
                       : latent_gradient<A, false>)(latents, static_cast<A>(factors[sample].grad_kl_clamped),
                                                    static_cast<A>(factors[sample].grad_kl), sample, chunk, out);
  };
  const int64_t latent_dims = wants_latents(out) ? latents.dims : 0;
  const auto of_latents = each(latent_dims, latent_task);
  const bool is_broadcast = data.has_log_sigma && data.log_sigma.rank > 0;
  const bool data_wanted = wants_data(out) || (is_broadcast && out.log_sigma.base);
  if (data_wanted && is_broadcast) grads_broadcast<A>(batch, factors, out);
  if (!data_wanted || is_broadcast) {
    for_shares(batch.size, 0, latent_dims, nothing, of_latents);
  } else if (!data.has_log_sigma) {
    for_shares(batch.size, data.dims, latent_dims, each_again(data.dims, plain), of_latents);
  } else {
    for_shares(batch.size, data.dims, latent_dims, each_again(data.dims, dense), of_latents);
  }
}

template void elbo_grads<float>(const Batch&, const std::vector<Factors>&, const Gradients&);
template void elbo_grads<double>(const Batch&, const std::vector<Factors>&, const Gradients&);

}  // namespace elbo
