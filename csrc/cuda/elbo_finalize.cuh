// Stage two, O(B) and in double: partial sums to loss, distortion, rate and σ, in one block.
#pragma once

#include "device.cuh"

namespace elbo {

constexpr int kFinalizeThreads = 1024;

struct FinalizeArguments {
  int64_t batch, dims;  // dims: of the data, 0 if there are none
  double scale;         // the reduction's weight, unless it depends on the elements' weights
  Partials partials;
  int64_t data_chunks, latent_chunks;  // of a sample
  Options options;
  Outputs outputs;
};

// Of what the block has summed up: every thread has its copy.
struct Totals {
  double a, kl, clamped, weights;
};

// Σ over the chunks of each sample, with what is added to it, into stats; and over the batch.
template <class A>
__device__ double sum_chunks(
    const void* partials, int64_t batch, int64_t chunks, A* row, const Number& extra = Number{}) {
  const A* from = static_cast<const A*>(partials);
  if (from == nullptr) {
    for (int64_t i = threadIdx.x; i <= batch; i += blockDim.x) row[i] = A(0);
    __syncthreads();
    return 0;
  }
  // As many lanes for a sample as it has chunks, up to a warp; the whole block where there are few samples.
  const bool block_each = chunks > kWarpSize && batch < static_cast<int64_t>(blockDim.x) / kWarpSize / 4;
  int lanes = 1;
  while (lanes < kWarpSize && lanes < chunks) lanes *= 2;
  const int64_t together = block_each ? 1 : blockDim.x / lanes;
  const int width = block_each ? static_cast<int>(blockDim.x) : lanes;
  for (int64_t begin = 0; begin < batch; begin += together) {
    const int64_t sample = begin + threadIdx.x / width;
    double sum = 0;
    if (sample < batch) {
      for (int64_t p = threadIdx.x % width; p < chunks; p += width)
        sum += static_cast<double>(from[sample * chunks + p]);
    }
    sum = block_each ? block_sum(sum) : warp_sum(sum, lanes);
    if (sample < batch && threadIdx.x % width == 0) row[sample] = static_cast<A>(sum + at(extra, sample));
  }
  __syncthreads();
  double own = 0;
  for (int64_t i = threadIdx.x; i < batch; i += blockDim.x) own += static_cast<double>(row[i]);
  const double total = block_sum(own);
  if (threadIdx.x == 0) row[batch] = static_cast<A>(total);
  return total;
}

template <class A>
__device__ void finish(const FinalizeArguments& args, const Totals& totals) {
  const Options& options = args.options;
  const Outputs& out = args.outputs;
  const A* stats = static_cast<const A*>(out.stats);
  const int64_t row = args.batch + 1;
  const double batch = static_cast<double>(args.batch);
  const bool weighs = args.partials.weights != nullptr;
  A *loss = static_cast<A*>(out.loss), *nats = static_cast<A*>(out.distortion), *rate = static_cast<A*>(out.rate);
  const double elements = weighs ? totals.weights : batch * static_cast<double>(args.dims);
  double distortions = 0, losses = 0;
  for (int64_t i = threadIdx.x; i < args.batch; i += blockDim.x) {
    const double a = stats[i], kl = stats[row + i], clamped = stats[2 * row + i];
    const double dims = weighs ? static_cast<double>(stats[3 * row + i]) : static_cast<double>(args.dims);
    const Sigma sigma = sigma_of(options, i, a, totals.a, elements, dims);
    const double d = distortion_of(options, a, dims, sigma);
    const double l = d + at(options.beta, i) * limited_rate(options, clamped);
    if (options.sigma_mode != kElement && (out.sigma_each || i == 0)) {
      static_cast<A*>(out.sigma)[i] = static_cast<A>(::exp(sigma.log_sigma));
    }
    if (options.reduction == kNone) {
      loss[i] = static_cast<A>(l);
      nats[i] = static_cast<A>(d);
      rate[i] = static_cast<A>(kl);
    }
    distortions += d;
    losses += l;
  }
  if (options.reduction == kNone) return;
  const double scale = totals.weights == 0 ? args.scale : reduction_weight(options.reduction, batch, totals.weights);
  distortions = scale * block_sum(distortions);
  losses = scale * block_sum(losses);
  if (threadIdx.x != 0) return;
  if (limits_batch(options.limit_mode)) {
    losses = distortions + scale * limited_batch(options, batch, totals.clamped / batch);
  }
  *loss = static_cast<A>(losses);
  *nats = static_cast<A>(distortions);
  *rate = static_cast<A>(scale * totals.kl);
}

template <class A>
__device__ void run_finalize(const FinalizeArguments& args) {
  A* stats = static_cast<A*>(args.outputs.stats);
  const Partials& from = args.partials;
  const int64_t row = args.batch + 1;
  Totals totals;
  totals.a = sum_chunks(from.a, args.batch, args.data_chunks, stats, args.options.extra_error);
  totals.kl = sum_chunks(from.kl, args.batch, args.latent_chunks, stats + row);
  totals.clamped = sum_chunks(from.clamped, args.batch, args.latent_chunks, stats + 2 * row);
  totals.weights = from.weights ? sum_chunks(from.weights, args.batch, args.data_chunks, stats + 3 * row) : 0;
  if (args.outputs.loss) finish<A>(args, totals);
}

template <class A>
__global__ void __launch_bounds__(kFinalizeThreads) elbo_finalize_kernel(FinalizeArguments args) {
  run_finalize<A>(args);
}

}  // namespace elbo
