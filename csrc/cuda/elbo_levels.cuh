// The rates of a hierarchy's levels, and their gradients: a launch has as many levels as its arguments hold, whose
// chunks are numbered through. What is done with a chunk is what elbo_stats and elbo_grads do with one of the latents'.
#pragma once

#include "elbo_grads.cuh"
#include "elbo_levels.h"
#include "elbo_stats.cuh"

namespace elbo {

struct LevelsArguments {
  int32_t count;
  int64_t chunks;  // of all levels
  double free_bits;
  void* partials;
  int64_t partials_per_sample;
  Number grad;  // of the level whose `grad` it has
  Level levels[kLevels];
};
static_assert(sizeof(LevelsArguments) <= 4096, "more than a kernel can be passed");

// `count` levels from `first` on: where their partial sums begin among those of a sample, and where the last ones end.
struct LevelSumsArguments {
  int64_t batch, levels, partials_per_sample;
  int32_t first, count;
  const void* partials;
  void* rates;
  bool per_level;
  int32_t begin[kSummedLevels + 1];
};
static_assert(sizeof(LevelSumsArguments) <= 4096, "more than a kernel can be passed");

__device__ inline int64_t itemsize_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

__device__ inline Span span_of(const Level& level, int k, char* base, int64_t stride) {
  return {base, level.dtypes[k], itemsize_of(level.dtypes[k]), stride};
}

__device__ inline Latents latents_of(const Level& level, double free_bits) {
  const auto span = [&](int k) { return span_of(level, k, level.tensors[k], level.strides[k]); };
  Latents l;
  l.dims = level.dims;
  l.mu = span(0);
  l.logvar = span(1);
  l.has_prior = level.tensors[2] != nullptr;
  l.prior_mu = span(2);
  l.prior_logvar = span(3);
  l.has_free_bits = free_bits > 0;
  l.free_bits = free_bits;
  return l;
}

__device__ inline Gradients gradients_of(const Level& level) {
  const auto span = [&](int k) { return span_of(level, k, level.gradients[k], level.dims); };
  Gradients g;
  g.mu = span(0);
  g.logvar = span(1);
  g.prior_mu = span(2);
  g.prior_logvar = span(3);
  return g;
}

// Calls f(level, chunk) for those that are this warp's.
template <class F>
__device__ inline void for_level_chunks(const LevelsArguments& args, F f) {
  int k = 0;
  for (int64_t i = warp_of_blocks(0); i < args.chunks; i += warps_of_blocks(gridDim.x)) {
    while (k + 1 < args.count && i >= args.levels[k + 1].first_chunk) ++k;
    const Level& level = args.levels[k];
    const int64_t own = i - level.first_chunk, sample = own / level.chunks_per_sample;
    const int64_t first = own % level.chunks_per_sample * level.chunk_size;
    f(level, Chunk{false, own, sample, first, static_cast<int>(min(level.dims - first, level.chunk_size))});
  }
}

template <class A>
__device__ void run_levels(const LevelsArguments& args) {
  for_level_chunks(args, [&](const Level& level, const Chunk& chunk) {
    A rate, clamped;  // the plain one no one asks for
    rates<A>(latents_of(level, args.free_bits), chunk, rate, clamped);
    const int64_t at = chunk.sample * args.partials_per_sample + level.first_partial + chunk.first / level.chunk_size;
    if (lane() == 0) static_cast<A*>(args.partials)[at] = clamped;
  });
}

template <class A>
__device__ void run_levels_grads(const LevelsArguments& args) {
  for_level_chunks(args, [&](const Level& level, const Chunk& chunk) {
    Number grad = args.grad;
    grad.tensor.base = const_cast<char*>(level.grad);
    const A weight = static_cast<A>(at(grad, chunk.sample));
    latent_gradient<A>(latents_of(level, args.free_bits), gradients_of(level), weight, A(0), chunk);
  });
}

// A block takes a sample: a warp the chunks of a level, and then one warp the levels, each in an order that only their
// numbers decide.
template <class A>
__device__ void run_level_sums(const LevelSumsArguments& args) {
  __shared__ double sums[kSummedLevels];
  A* rates = static_cast<A*>(args.rates);
  for (int64_t i = blockIdx.x; i < args.batch; i += gridDim.x) {
    const A* partials = static_cast<const A*>(args.partials) + i * args.partials_per_sample;
    for (int level = warp(); level < args.count; level += static_cast<int>(blockDim.x) / kWarpSize) {
      double sum = 0;
      for (int p = args.begin[level] + lane(); p < args.begin[level + 1]; p += kWarpSize) sum += partials[p];
      sum = warp_sum(sum);
      if (lane() == 0) sums[level] = sum;
      if (lane() == 0 && args.per_level) rates[i * args.levels + args.first + level] = static_cast<A>(sum);
    }
    __syncthreads();
    if (warp() == 0 && !args.per_level) {
      double total = 0;
      for (int level = lane(); level < args.count; level += kWarpSize) total += sums[level];
      total = warp_sum(total);
      if (lane() == 0) rates[i] = static_cast<A>(total + (args.first ? static_cast<double>(rates[i]) : 0.0));
    }
    __syncthreads();  // or the next sample's sums would be written over these
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, 3>) elbo_levels_kernel(LevelsArguments args) {
  run_levels<A>(args);
}

template <class A>
__global__ void __launch_bounds__(kThreads) elbo_level_sums_kernel(LevelSumsArguments args) {
  run_level_sums<A>(args);
}

template <class A>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, 2>) elbo_levels_grads_kernel(LevelsArguments args) {
  run_levels_grads<A>(args);
}

}  // namespace elbo
