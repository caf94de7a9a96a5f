#include "elbo_levels.cuh"

namespace elbo {

LevelsBatch chunked(int64_t batch, bool is_double, const std::vector<Latents>& levels) {
  LevelsBatch all;
  all.size = batch;
  all.is_double = is_double;
  int64_t first_chunk = 0;
  for (const Latents& latents : levels) {
    const Chunks chunks = chunks_of(latents.dims, batch);
    Level level = {};
    const Span* const spans[] = {&latents.mu, &latents.logvar, &latents.prior_mu, &latents.prior_logvar};
    for (int k = 0; k < 4; ++k) {
      level.tensors[k] = spans[k]->base;
      level.strides[k] = spans[k]->batch_stride;
      level.dtypes[k] = spans[k]->dtype;
    }
    level.dims = latents.dims;
    level.chunk_size = chunks.size;
    level.chunks_per_sample = chunks.per_sample;
    level.first_chunk = first_chunk;
    level.first_partial = all.partials;
    level.index = static_cast<int32_t>(all.levels.size());
    first_chunk += chunks.count;
    all.partials += chunks.per_sample;
    all.free_bits = latents.free_bits;
    all.levels.push_back(level);
  }
  return all;
}

namespace {

// Calls run(arguments) for each launch of some levels.
template <class Run>
void for_launches(const LevelsBatch& batch, const std::vector<Level>& levels, LevelsArguments args, Run run) {
  args.free_bits = batch.free_bits;
  args.partials_per_sample = batch.partials;
  for (size_t begin = 0; begin < levels.size(); begin += kLevels) {
    args.count = static_cast<int32_t>(std::min<size_t>(kLevels, levels.size() - begin));
    args.chunks = 0;
    for (int k = 0; k < args.count; ++k) {
      args.levels[k] = levels[begin + k];
      args.levels[k].first_chunk = args.chunks;
      args.chunks += args.levels[k].chunks_per_sample * batch.size;
    }
    run(args);
  }
}

}  // namespace

void elbo_levels(const LevelsBatch& batch, void* partials, void* rates, bool per_level, cudaStream_t stream) {
  LevelsArguments args = {};
  args.partials = partials;
  for_launches(batch, batch.levels, args, [&](const LevelsArguments& launched) {
    const auto kernel = batch.is_double ? elbo_levels_kernel<double> : elbo_levels_kernel<float>;
    const int64_t resident = blocks_at_once(kernel, kThreads, 0);
    launch("elbo_levels", kernel, launched, blocks_for(launched.chunks, resident), kThreads, stream);
  });
  const int64_t count = static_cast<int64_t>(batch.levels.size());
  LevelSumsArguments sums = {batch.size, count, batch.partials, 0, 0, partials, rates, per_level, {}};
  for (int64_t first = 0; first < count; first += kSummedLevels) {
    sums.first = static_cast<int32_t>(first);
    sums.count = static_cast<int32_t>(std::min<int64_t>(kSummedLevels, count - first));
    for (int k = 0; k <= sums.count; ++k) {
      const bool past = first + k == count;
      sums.begin[k] = static_cast<int32_t>(past ? batch.partials : batch.levels[first + k].first_partial);
    }
    const auto kernel = batch.is_double ? elbo_level_sums_kernel<double> : elbo_level_sums_kernel<float>;
    const int64_t resident = blocks_at_once(kernel, kThreads, 0);
    launch("elbo_level_sums", kernel, sums, std::min(batch.size, resident), kThreads, stream);
  }
}

void elbo_levels_grads(
    LevelsBatch batch, const std::vector<Number>& grads, const std::vector<Gradients>& gradients, cudaStream_t stream) {
  std::vector<Level> wanted;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!wants_latents(gradients[i])) continue;
    const Gradients& g = gradients[i];
    const Span* const spans[] = {&g.mu, &g.logvar, &g.prior_mu, &g.prior_logvar};
    wanted.push_back(batch.levels[i]);
    for (int k = 0; k < 4; ++k) wanted.back().gradients[k] = spans[k]->base;
    wanted.back().grad = grads[i].tensor.base;
  }
  LevelsArguments args = {};
  args.grad = grads[0];
  for_launches(batch, wanted, args, [&](const LevelsArguments& launched) {
    const auto kernel = batch.is_double ? elbo_levels_grads_kernel<double> : elbo_levels_grads_kernel<float>;
    const int64_t resident = blocks_at_once(kernel, kThreads, 0);
    launch("elbo_levels_grads", kernel, launched, blocks_for(launched.chunks, resident), kThreads, stream);
  });
}

}  // namespace elbo
