// The rates of a hierarchy's levels, all in one parallel region: many levels are so small that starting the threads for
// each would take longer than its arithmetic.
#include <algorithm>
#include <numeric>

#include "elbo.h"
#include "latents.h"
#include "tasks.h"

namespace elbo {
namespace {

// Calls f(level, sample, chunk) for all of them, each thread for as many elements as the others have, or nearly.
template <class F>
void for_levels(int64_t batch, const std::vector<Latents>& levels, F f) {
  std::vector<int64_t> elements{0}, tasks{0};  // before each level, and in all
  for (const Latents& level : levels) {
    elements.push_back(elements.back() + batch * level.dims);
    tasks.push_back(tasks.back() + batch * chunks(level.dims));
  }
  const auto level_of = [](const std::vector<int64_t>& before, int64_t i) {
    return std::upper_bound(before.begin(), before.end(), i) - before.begin() - 1;
  };
  const auto task_of = [&](int64_t element) {
    if (element == elements.back()) return tasks.back();
    const int64_t level = level_of(elements, element), dims = levels[level].dims;
    const int64_t within = element - elements[level];
    return tasks[level] + within / dims * chunks(dims) + within % dims / kChunk;
  };
  const int64_t work = kLatentCost * elements.back();
  const int64_t shares = std::clamp<int64_t>(work / kGrain, 1, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const int64_t stop = task_of(elements.back() * end / shares);
    int64_t task = task_of(elements.back() * begin / shares);
    for (int64_t level = level_of(tasks, task); task < stop; ++task) {
      while (task >= tasks[level + 1]) ++level;
      const int64_t within = task - tasks[level], per_sample = chunks(levels[level].dims);
      f(level, within / per_sample, within % per_sample);
    }
  });
}

}  // namespace

template <class A>
std::vector<double> elbo_levels(int64_t batch, const std::vector<Latents>& levels, bool per_level) {
  std::vector<std::vector<double>> partials;
  for (const Latents& level : levels) partials.emplace_back(batch * chunks(level.dims));
  for_levels(batch, levels, [&](int64_t level, int64_t sample, int64_t chunk) {
    const Latents& latents = levels[level];
    double rate;  // the plain one, which no one asks for here
    double& clamped = partials[level][sample * chunks(latents.dims) + chunk];
    rates_of<A>(latents)(latents, sample, chunk, rate, clamped);
  });
  const int64_t count = per_level ? static_cast<int64_t>(levels.size()) : 1;
  std::vector<double> sums(batch * count, 0.0);
  for (size_t level = 0; level < levels.size(); ++level) {
    const std::vector<double> own = sums_of(batch, partials[level]);
    for (int64_t i = 0; i < batch; ++i) sums[i * count + (per_level ? level : 0)] += own[i];
  }
  return sums;
}

template <class A>
void elbo_levels_grads(
    int64_t batch, const std::vector<Latents>& levels, const std::vector<Number>& grads,
    const std::vector<Gradients>& out) {
  for_levels(batch, levels, [&](int64_t level, int64_t sample, int64_t chunk) {
    const Latents& latents = levels[level];
    const A grad = static_cast<A>(at(grads[level], sample));
    latent_gradient_of<A>(latents)(latents, grad, A{0}, sample, chunk, out[level]);
  });
}

template std::vector<double> elbo_levels<float>(int64_t, const std::vector<Latents>&, bool);
template std::vector<double> elbo_levels<double>(int64_t, const std::vector<Latents>&, bool);
template void elbo_levels_grads<float>(
    int64_t, const std::vector<Latents>&, const std::vector<Number>&, const std::vector<Gradients>&);
template void elbo_levels_grads<double>(
    int64_t, const std::vector<Latents>&, const std::vector<Number>&, const std::vector<Gradients>&);

}  // namespace elbo
