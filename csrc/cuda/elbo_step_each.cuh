// Loss and gradients in one pass over the data where the samples have nothing to agree on: σ is given, or each sample's
// own optimum. Then A of a sample, if anything, decides its gradient, and no barrier of the grid is needed; the loss
// is elbo_finalize's. recon and target are read once: 3N instead of 5N.
#pragma once

#include "elbo_grads.cuh"
#include "elbo_stats.cuh"
#include "step_plan.h"

namespace elbo {

struct StepEachArguments {
  GradsArguments grads;  // without stats: `loss` of its grad_outputs alone counts
  Partials partials;     // for elbo_finalize: of chunks where σ is given, else of samples
  int data_blocks;       // of a block for each sample; the others do the latents
};

extern __shared__ float on_chip[];  // the differences of a sample

// The factors of a sample, given A where σ is its own optimum.
__device__ inline Factors own_factors(const GradsArguments& args, int64_t i, double a) {
  const Weight weight = loss_weight(args, i);
  const double dims = static_cast<double>(args.batch.data.dims);
  const Sigma sigma = sigma_of(args.options, i, a, 0, 0, dims);
  return factors_of(args.options, sigma, i, a, 0, dims, 0, weight);
}

// One warp over a part of a sample: Σ e² of its lane's elements, and with each group of differences `use(i, e, count)`.
template <class Elements, class Use>
__device__ float differences(const Elements& elements, int n, int head, Use use) {
  float sum = 0;
  walk<Elements::Turns, Elements::V>(
      n, head, [&](int i, auto count) { return elements.load(i, count); },
      [&](int i, const auto& fetched, auto count) {
        Values<float, count.n> e;
        float part = 0;
#pragma unroll
        for (int j = 0; j < count.n; ++j) {
          e.value[j] = fetched.error(j);
          part += power<2>(e.value[j]);
        }
        sum += part;
        use(i, e, count);
      });
  return sum;
}

template <class R, class T>
struct Written {
  R* recon;
  T* target;

  __device__ Written(const Gradients& out, const Chunk& p)
      : recon(begin_of<R>(out.recon, p)), target(begin_of<T>(out.target, p)) {}

  template <int N>
  __device__ void put(int i, const Values<float, N>& e, float a, Count<N> count) const {
    if (recon) store_values(recon + i, count, [&](int j) { return a * e.value[j]; });
    if (target) store_values(target + i, count, [&](int j) { return -(a * e.value[j]); });
  }
};

// What a warp keeps on chip of its elements until their factor is known. It writes what it has read itself.
template <class R, class T>
struct KeptDifferences {
  using Elements = DataChunk<float, R, T, false>;
  float* kept;
  Written<R, T> out;

  __device__ KeptDifferences(float* kept, const Data&, const Gradients& gradients, const Chunk& p)
      : kept(kept), out(gradients, p) {}

  __device__ int head(const Elements& elements, int n) const {
    return elements.head(n, out.recon, out.target);
  }

  // Returns the lane's sum.
  __device__ float keep(const Elements& elements, int n, int head) const {
    return differences(elements, n, head, [&](int i, const auto& e, auto count) {
#pragma unroll
      for (int j = 0; j < count.n; ++j) kept[i + j] = e.value[j];
    });
  }

  __device__ void write(int n, int head, float a) const {
    walk<Elements::Turns, Elements::V>(
        n, head,
        [&](int i, auto count) {
          Values<float, count.n> e;
#pragma unroll
          for (int j = 0; j < count.n; ++j) e.value[j] = kept[i + j];
          return e;
        },
        [&](int i, const auto& e, auto count) { out.put(i, e, a, count); });
  }
};

template <class R, class T>
using Kept = std::conditional_t<kIsMixed<T>, KeptSlopes<R>, KeptDifferences<R, T>>;

// σ is given: a chunk needs nothing but itself.
template <class R, class T>
__device__ void given_chunk(const StepEachArguments& args, const Chunk& p) {
  const Data& data = args.grads.batch.data;
  const Gradients& gradients = args.grads.gradients;
  const float a = static_cast<float>(own_factors(args.grads, p.sample, 0).recon_scale);
  if constexpr (kIsMixed<T>) {
    write_sums(mixed_gradient<float, R, false, Order::kForward>(data, gradients, a, p), args.partials, p);
  } else {
    const DataChunk<float, R, T, false> elements(data, p.sample, p.first);
    const Written<R, T> out(gradients, p);
    const float sum = warp_sum(differences(
        elements, p.n, elements.head(p.n, out.recon, out.target),
        [&](int i, const auto& e, auto count) { out.put(i, e, a, count); }));
    if (lane() == 0) static_cast<float*>(args.partials.a)[p.index] = sum;
  }
}

// σ is the sample's own: a block keeps what it needs until it knows A.
template <class R, class T>
__device__ void own_sample(const StepEachArguments& args, int64_t sample) {
  using Elements = typename Kept<R, T>::Elements;
  const Data& data = args.grads.batch.data;
  constexpr int row = kWarpSize * Elements::V;
  const int dims = static_cast<int>(data.dims), each = ((dims + row - 1) / row + kStepWarps - 1) / kStepWarps * row;
  const int first = min(warp() * each, dims);
  const Chunk p = {true, sample, sample, first, min(each, dims - first)};
  const Elements elements(data, sample, first);
  const Kept<R, T> kept(on_chip + first, data, args.grads.gradients, p);
  const int head = kept.head(elements, p.n);
  const float sum = static_cast<float>(block_sum(kept.keep(elements, p.n, head)));
  if (threadIdx.x == 0) static_cast<float*>(args.partials.a)[sample] = sum;
  const double a = static_cast<float>(sum + at(args.grads.options.extra_error, sample));  // as elbo_finalize stores it
  kept.write(p.n, head, static_cast<float>(own_factors(args.grads, sample, a).recon_scale));
  __syncthreads();  // in the next sample, vectors may begin elsewhere, and lanes have other elements
}

__device__ inline void latents_of_chunk(const StepEachArguments& args, const Chunk& p) {
  write_rates<float>(args.grads.batch, args.partials, p);
  if (!args.grads.with_latents) return;
  const float b = static_cast<float>(own_factors(args.grads, p.sample, 0).grad_kl_clamped);
  latent_gradient<float>(args.grads.batch.latents, args.grads.gradients, b, 0.0f, p);
}

template <class R, class T, bool Own>
__device__ void run_step_each(const StepEachArguments& args) {
  const ChunkedBatch& batch = args.grads.batch;
  const int data_blocks = Own ? args.data_blocks : 0, block = static_cast<int>(blockIdx.x);
  if (block < data_blocks) {
    for (int64_t sample = block; sample < batch.size; sample += data_blocks) own_sample<R, T>(args, sample);
    return;
  }
  const int64_t index = warp_of_blocks(data_blocks), warps = warps_of_blocks(gridDim.x - data_blocks);
  for_chunks(batch, !Own, true, index, warps, [&](const Chunk& p) {
    p.is_data ? given_chunk<R, T>(args, p) : latents_of_chunk(args, p);
  });
}

template <class R, class T, bool Own>
__global__ void __launch_bounds__(kStepThreads, 1) elbo_step_each_kernel(StepEachArguments args) {
  run_step_each<R, T, Own>(args);
}

}  // namespace elbo
