// All stages in one call. Where a sample's σ is its own, the gradient of what was just summed is taken while it is in
// the cache, and the data are read from memory once; the numbers are those of the three stages called one after the
// other.
#include "elbo.h"
#include "tasks.h"

namespace elbo {
namespace {

constexpr int64_t kCache = int64_t{1} << 20;  // bytes of a core's own cache that a sample may fill

template <class A>
double as_stored(double value) {
  return static_cast<A>(value);
}

// σ is given, so that a chunk's gradient needs no sum: chunk by chunk.
template <class A>
std::vector<double> given_pass(
    int64_t batch, const Data& data, const Knobs& knobs, double grad_scale, const Gradients& out) {
  const int64_t per_sample = chunks(data.dims);
  std::vector<double> partials(batch * per_sample);
  for_chunks(batch, data.dims, [&](int64_t sample, int64_t chunk) {
    partials[sample * per_sample + chunk] = squared_error<A>(data, sample, chunk);
    const double a = own_error_weight(sample, 0, batch, data.dims, knobs, grad_scale);
    data_gradient<A>(data, static_cast<A>(a), sample, chunk, out);
  });
  return sums_of(batch, partials);
}

// σ is the sample's optimum: sample by sample.
template <class A>
std::vector<double> image_pass(
    int64_t batch, const Data& data, const Knobs& knobs, double grad_scale, const Gradients& out) {
  const int64_t count = chunks(data.dims);
  std::vector<double> s(batch);
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrain / data.dims), [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < count; ++chunk) sum += squared_error<A>(data, sample, chunk);
      s[sample] = sum;
      const double a = own_error_weight(sample, as_stored<A>(sum), batch, data.dims, knobs, grad_scale);
      for (int64_t chunk = count; chunk-- > 0;) data_gradient<A>(data, static_cast<A>(a), sample, chunk, out);
    }
  });
  return s;
}

// Whether whole samples are tasks that fit the cache, and enough of them to keep every thread at work.
bool samples_are_tasks(int64_t batch, const Data& data) {
  const int64_t bytes = data.dims * (data.recon.itemsize + data.target.itemsize);
  return bytes <= kCache && batch >= 4 * int64_t{torch::stable::get_num_threads()};
}

}  // namespace

template <class A>
Step elbo_step(
    int64_t batch, const Data& data, const Latents& latents, const Knobs& knobs, double grad_scale,
    const Gradients& out) {
  const bool wanted = out.recon.base || out.target.base;
  const bool given = wanted && data.dims && knobs.sigma_mode == kGiven;
  const bool image = wanted && data.dims && knobs.sigma_mode == kImage && samples_are_tasks(batch, data);
  const Data rest = given || image ? Data{} : data;

  Step step;
  step.stats = elbo_stats<A>(batch, rest, latents);
  if (given) step.stats.s = given_pass<A>(batch, data, knobs, grad_scale, out);
  if (image) step.stats.s = image_pass<A>(batch, data, knobs, grad_scale, out);
  for (auto* row : {&step.stats.s, &step.stats.kl, &step.stats.kl_clamped}) {
    for (double& value : *row) value = as_stored<A>(value);
  }
  step.weights = elbo_weights(step.stats, data.dims, latents.dims, knobs, {{grad_scale}, {}, {}});
  elbo_grads<A>(batch, rest, latents, step.weights, out);
  return step;
}

template Step elbo_step<float>(int64_t, const Data&, const Latents&, const Knobs&, double, const Gradients&);
template Step elbo_step<double>(int64_t, const Data&, const Latents&, const Knobs&, double, const Gradients&);

}  // namespace elbo
