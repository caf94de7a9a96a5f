// All stages in one call. Where a sample's σ is its own, a gradient is taken while what was summed for it is in the
// cache, so that the data are read from memory once. The numbers are those of the stages called one after the other.
#include "blocks.h"
#include "elbo.h"
#include "tasks.h"

namespace elbo {
namespace {

// Bytes of recon and target that a sample may have to stay in a core's own cache: most have 1 MiB or more.
constexpr int64_t kCache = int64_t{1} << 20;

// σ is given: no gradient waits for a sum, and each block is read, and converted, once.
template <class A, int Q>
std::vector<double> given_pass(const Batch& batch, const Options& options, double grad_scale, const Gradients& out) {
  const Data& data = batch.data;
  const int64_t per_sample = chunks(data.dims);
  std::vector<double> partials(batch.size * per_sample);
  const auto task = [&](int64_t sample, int64_t chunk) {
    const A a = static_cast<A>(own_recon_scale(sample, 0, batch, options, grad_scale));
    double sum = 0;
    for_blocks(chunk, data.dims, [&](int64_t first, int64_t n) {
      if (data.activation != kNoActivation) {  // one exp for both
        const DataBlock<A> block(data, sample, first, n, true);
        sum += block_sums<A, Q>(block, n).a;
        block_gradient<A, Q, false, true>(block, a, sample, first, n, out, [](int64_t, int64_t, const A*) {});
        return;
      }
      with_block<A>(data, sample, first, n, [&](const auto* r, const auto* t) {
        sum += error_sum<Q>(r, t, n);
        data_gradient<Q>(a, r, t, sample, first, n, out);
      });
    });
    partials[sample * per_sample + chunk] = sum;
  };
  for_shares(batch.size, data.dims, 0, each(data.dims, task), nothing);
  return sums_of(batch.size, partials);
}

// σ is the sample's optimum: a sample is summed, and then in the cache for its gradient.
template <class A, int Q>
std::vector<double> image_pass(const Batch& batch, const Options& options, double grad_scale, const Gradients& out) {
  const Data& data = batch.data;
  const int64_t count = chunks(data.dims);
  std::vector<double> sums(batch.size);
  torch::stable::parallel_for(0, batch.size, std::max<int64_t>(1, kGrain / data.dims), [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      for (int64_t chunk = 0; chunk < count; ++chunk) sums[sample] += chunk_sum<A, Q>(data, sample, chunk);
      const double stored = static_cast<A>(sums[sample] + at(options.extra_error, sample));
      const A a = static_cast<A>(own_recon_scale(sample, stored, batch, options, grad_scale));
      for (int64_t chunk = 0; chunk < count; ++chunk) chunk_gradient<A, Q>(data, a, sample, chunk, out);
    }
  });
  return sums;
}

// Whether image_pass is worth it: samples that fit the cache, enough of them to keep every thread at work, and numbers
// of the width that is computed in. Half-precision data are bound by arithmetic where they are in any cache, and gained
// nothing.
template <class A>
bool samples_are_tasks(int64_t batch, const Data& data) {
  const bool converted = data.recon.dtype != kDtype<A> || data.target.dtype != kDtype<A>;
  const int64_t bytes = 2 * data.dims * static_cast<int64_t>(sizeof(A));
  return !converted && bytes <= kCache && batch >= 4 * int64_t{torch::stable::get_num_threads()};
}

}  // namespace

template <class A>
Stats elbo_step(const Batch& batch, const Options& options, double grad_scale, const Gradients& out) {
  const Data& data = batch.data;
  const bool wanted = (out.recon.base || out.target.base) && !has_elements(data);
  const bool given = wanted && options.sigma_mode == kGiven;
  const bool image =
      wanted && options.sigma_mode == kImage && !has_factors(data) && samples_are_tasks<A>(batch.size, data);
  Batch rest = batch;
  if (given || image) rest.data = {};

  Stats stats = elbo_stats<A>(rest, options.extra_error);
  const bool gaussian = data.exponent == 2;
  std::vector<double> sums;
  if (given) sums = (gaussian ? given_pass<A, 2> : given_pass<A, 1>)(batch, options, grad_scale, out);
  if (image) sums = (gaussian ? image_pass<A, 2> : image_pass<A, 1>)(batch, options, grad_scale, out);
  if (given || image) stats.a = with_extra_error(std::move(sums), options.extra_error);
  stats = as_stored<A>(std::move(stats));
  const std::vector<Factors> factors = elbo_factors(stats, batch, options, {{{}, grad_scale}, {}, {}}, out);
  elbo_grads<A>(rest, factors, out);
  return stats;
}

template Stats elbo_step<float>(const Batch&, const Options&, double, const Gradients&);
template Stats elbo_step<double>(const Batch&, const Options&, double, const Gradients&);

}  // namespace elbo
