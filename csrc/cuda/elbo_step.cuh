// Loss and gradients in one pass, for one σ = √MSE of the batch: every block keeps its differences on chip, in
// registers and then in shared memory, the grid agrees on Σ|e|^q, and the gradients are written from what was kept.
// recon and target are read once: 3N instead of 5N.
//
// The last blocks have no data: they do the latents, and the very last one what is O(B). So that arithmetic takes no
// registers from the differences.
#pragma once

#include <cooperative_groups.h>

#include "elbo_grads.cuh"
#include "elbo_stats.cuh"
#include "step_plan.h"

namespace elbo {

struct StepArguments {
  GradsArguments grads;  // without stats: `loss` of its grad_outputs alone counts
  Outputs outputs;       // without stats
  Partials partials;     // of the latents
  StepPlan plan;
  int64_t elements;  // of recon, all samples
  double* sums;      // of |e|^q, one for each block with data
  double* agreed;    // what the last block tells the others: a, and the mean rate
};

extern __shared__ float on_chip[];  // differences that registers have no room for, [rows][V][threads]

// A warp's row: one vector of every lane. The batch is a whole number of vectors; elbo_step_plan checks it.
template <class R, class T>
struct Row {
  static constexpr int V = 16 / sizeof(R);
  int64_t first;  // of this lane
  bool inside;

  __device__ Row(const StepArguments& args, int k) {
    const int64_t row = warp_of_blocks(0) * args.plan.rows + k;
    first = (row * kWarpSize + lane()) * V;
    inside = k < args.plan.rows && first < args.elements;
  }

  template <bool Full>
  __device__ void read(const StepArguments& args, float (&e)[V]) const {
    if (Full || inside) {
      const auto r = load(reinterpret_cast<const R*>(args.grads.batch.data.recon.base) + first, Count<V>{});
      const auto t = load(reinterpret_cast<const T*>(args.grads.batch.data.target.base) + first, Count<V>{});
#pragma unroll
      for (int j = 0; j < V; ++j) e[j] = difference(static_cast<float>(r.value[j]), static_cast<float>(t.value[j]));
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) e[j] = 0;
    }
  }

  template <class G>
  __device__ void write(const Span& to, const float (&e)[V], float a) const {
    if (to.base == nullptr || !inside) return;
    store_values(reinterpret_cast<G*>(to.base) + first, Count<V>{}, [&](int j) { return a * e[j]; });
  }
};

// What registers do not hold, one difference after the other.
__device__ inline float& beyond(int k, int j, int vector) {
  return on_chip[(k * vector + j) * kStepThreads + threadIdx.x];
}

template <class R, class T>
struct Held {
  static constexpr int V = Row<R, T>::V, rows = kHeld / V;
  float e[rows][V];

  // Reads the warp's rows and returns this lane's Σ e². Full: no row is missing or short, so that nothing stands
  // between one row's loads and the next one's.
  template <bool Full>
  __device__ float read(const StepArguments& args) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < rows; ++k) {
      Row<R, T>(args, k).template read<Full>(args, e[k]);
      if (k % 4 == 3) __syncwarp();  // or all would be asked for at once, and spill
    }
#pragma unroll
    for (int k = 0; k < rows; ++k) sum += square(e[k]);
#pragma unroll 2
    for (int k = rows; k < args.plan.rows; ++k) {
      float more[V];
      Row<R, T>(args, k).template read<Full>(args, more);
      sum += square(more);
#pragma unroll
      for (int j = 0; j < V; ++j) beyond(k - rows, j, V) = more[j];
    }
    return sum;
  }

  static __device__ float square(const float (&x)[V]) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) sum += power<2>(x[j]);
    return sum;
  }
};

// What is told of elements at run time takes the registers: all differences are in shared memory.
template <class R>
__device__ void mixed_role(const StepArguments& args) {
  using Elements = MixedChunk<float, R, false>;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int64_t each =
      static_cast<int64_t>(args.plan.rows) * kWarpSize * (16 / sizeof(R));  // rows as the plan has them
  const int64_t first = warp_of_blocks(0) * each;
  const int n = static_cast<int>(max(min(args.elements - first, each), int64_t{0}));
  const Chunk p = {true, 0, 0, first, n};  // all samples are one block of memory
  const Elements elements(args.grads.batch.data, 0, first);
  const KeptSlopes<R> kept(on_chip + warp() * each, elements.data, args.grads.gradients, p);
  const double total = block_sum(kept.keep(elements, n, 0));
  if (threadIdx.x == 0) args.sums[blockIdx.x] = total;
  grid.sync();  // as in data_role
  grid.sync();
  kept.write(n, 0, static_cast<float>(args.agreed[0]));
}

template <class R, class T>
__device__ void data_role(const StepArguments& args) {
  constexpr int V = Row<R, T>::V, rows = Held<R, T>::rows;
  const Gradients& out = args.grads.gradients;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int64_t end = (warp_of_blocks(0) + 1) * args.plan.rows * kWarpSize * V;
  Held<R, T> held;
  const bool full = args.plan.rows >= rows && end <= args.elements;
  const float sum = full ? held.template read<true>(args) : held.template read<false>(args);
  const double total = block_sum(sum);
  if (threadIdx.x == 0) args.sums[blockIdx.x] = total;
  grid.sync();  // the last block adds the sums up
  grid.sync();  // and has told what follows
  const float a = static_cast<float>(args.agreed[0]);
#pragma unroll
  for (int k = 0; k < rows; ++k) {
    const Row<R, T> row(args, k);
    row.template write<R>(out.recon, held.e[k], a);
    row.template write<T>(out.target, held.e[k], -a);
  }
  for (int k = rows; k < args.plan.rows; ++k) {
    const Row<R, T> row(args, k);
    float e[V];
#pragma unroll
    for (int j = 0; j < V; ++j) e[j] = beyond(k - rows, j, V);
    row.template write<R>(out.recon, e, a);
    row.template write<T>(out.target, e, -a);
  }
}

// Everything O(B).
__device__ inline void last_block(const StepArguments& args) {
  const ChunkedBatch& batch = args.grads.batch;
  const Options& options = args.grads.options;
  const Gradients& out = args.grads.gradients;
  const int64_t each = batch.latent_chunks.per_sample;
  const auto* clamped_of = static_cast<const float*>(args.partials.clamped);
  const double size = static_cast<double>(batch.size), n = size * static_cast<double>(batch.data.dims);
  double a = 0, kl = 0, clamped = 0, weighed = 0;
  for (int b = threadIdx.x; b < args.plan.data_blocks; b += blockDim.x) a += args.sums[b];
  for (int64_t i = threadIdx.x; i < batch.size; i += blockDim.x) a += at(options.extra_error, i);
  for (int64_t p = threadIdx.x; p < batch.latent_chunks.count; p += blockDim.x) {
    const double c = clamped_of[p];
    kl += static_cast<const float*>(args.partials.kl)[p];
    clamped += c;
    weighed += at(options.beta, p / each) * c;
  }
  a = block_sum(a);
  kl = block_sum(kl);
  clamped = block_sum(clamped);
  weighed = block_sum(weighed);

  const double mean_rate = clamped / size;
  const Sigma sigma = sigma_of(options, 0, 0, a, n, 0);
  const Weight weight = loss_weight(args.grads, 0);
  if (out.beta.base && out.beta_each) {
    for (int64_t i = threadIdx.x; i < batch.size; i += blockDim.x) {
      double own = 0;
      for (int64_t p = 0; p < each; ++p) own += clamped_of[i * each + p];
      put<float>(out.beta, i, factors_of(options, sigma, i, 0, own, 0, mean_rate, weight).beta);
    }
  }
  if (threadIdx.x != 0) return;
  const bool limited = limits_batch(options.limit_mode);
  const double scale = args.grads.scale, nats = scale * distortion_of(options, a, n, sigma);
  const double penalty = scale * (limited ? limited_batch(options, size, mean_rate) : weighed);
  *static_cast<float*>(args.outputs.loss) = static_cast<float>(nats + penalty);
  *static_cast<float*>(args.outputs.distortion) = static_cast<float>(nats);
  *static_cast<float*>(args.outputs.rate) = static_cast<float>(scale * kl);
  *static_cast<float*>(args.outputs.sigma) = static_cast<float>(::exp(sigma.log_sigma));
  const Factors all = factors_of(options, sigma, 0, a, clamped, n, mean_rate, weight);  // of the batch as one sample
  args.agreed[0] = all.recon_scale + shared_sigma_term(sigma, all.log_sigma, a);
  args.agreed[1] = mean_rate;
  if (out.beta.base && !out.beta_each) put<float>(out.beta, 0, limited ? size * all.beta : all.beta);
}

// ∂L/∂A_i, the same of every sample; or their sum. After the last block has told.
__device__ inline void put_extra_error(const StepArguments& args) {
  const Gradients& out = args.grads.gradients;
  if (out.extra_error.base == nullptr) return;
  const double own = args.agreed[0] / args.grads.options.q;
  const int64_t size = args.grads.batch.size;
  if (!out.extra_error_each && threadIdx.x == 0) put<float>(out.extra_error, 0, own * static_cast<double>(size));
  if (!out.extra_error_each) return;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) put<float>(out.extra_error, i, own);
}

__device__ inline void latent_role(const StepArguments& args) {
  const ChunkedBatch& batch = args.grads.batch;
  const Options& options = args.grads.options;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int64_t index = warp_of_blocks(args.plan.data_blocks), warps = warps_of_blocks(args.plan.latent_blocks);
  for_chunks(
      batch, false, true, index, warps, [&](const Chunk& chunk) { write_rates<float>(batch, args.partials, chunk); });
  grid.sync();
  if (blockIdx.x == gridDim.x - 1) last_block(args);
  grid.sync();
  if (blockIdx.x == gridDim.x - 1) put_extra_error(args);
  const double mean_rate = args.agreed[1];
  for_chunks(batch, false, args.grads.with_latents, index, warps, [&](const Chunk& chunk) {
    const Weight weight = loss_weight(args.grads, 0);
    const Factors f = factors_of(options, Sigma{}, chunk.sample, 0, 0, 0, mean_rate, weight);
    latent_gradient<float>(batch.latents, args.grads.gradients, static_cast<float>(f.grad_kl_clamped), 0.0f, chunk);
  });
}

template <class R, class T>
__device__ void run_step(const StepArguments& args) {
  if (static_cast<int>(blockIdx.x) >= args.plan.data_blocks) return latent_role(args);
  if constexpr (kIsMixed<T>) {
    mixed_role<R>(args);
  } else {
    data_role<R, T>(args);
  }
}

template <class R, class T>
__global__ void __launch_bounds__(kStepThreads, 1) elbo_step_kernel(StepArguments args) {
  run_step<R, T>(args);
}

}  // namespace elbo
