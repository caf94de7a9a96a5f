// Loss and gradients in one pass, for one σ = √MSE of the batch: every block keeps its differences on chip, in
// registers and then in shared memory, the grid agrees on Σ e², and the gradients are written from what was kept. recon
// and target are read once: 3N instead of 5N.
//
// The last blocks have no data: they do the latents, and the very last, the leader, what is O(B). So that arithmetic
// takes no registers from the differences.
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
  double* sums;      // of e², one for each block with data
  double* agreed;    // what the leader tells the others: a, and the gap to the capacity
};

extern __shared__ float on_chip[];  // differences that registers have no room for, [rows][V][threads]

// A warp's row: one vector of every lane. There is no vector that the batch ends in, see elbo_step_plan.
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
      for (int j = 0; j < V; ++j) e[j] = static_cast<float>(r.value[j]) - static_cast<float>(t.value[j]);
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
    for (int j = 0; j < V; ++j) sum += x[j] * x[j];
    return sum;
  }
};

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
  grid.sync();  // the leader adds the sums up
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

// By the leader: everything O(B).
__device__ inline void lead(const StepArguments& args) {
  const Batch& batch = args.grads.batch;
  const Knobs& knobs = args.grads.knobs;
  const Pieces& pieces = batch.latents.pieces;
  const double size = static_cast<double>(batch.size), n = size * static_cast<double>(batch.data.dims);
  const double scale = args.grads.scale, w = scale * at(args.grads.grad_outputs.loss, 0);
  double s = 0, kl = 0, clamped = 0, weighed = 0;
  for (int b = threadIdx.x; b < args.plan.data_blocks; b += blockDim.x) s += args.sums[b];
  for (int64_t p = threadIdx.x; p < pieces.count; p += blockDim.x) {
    const double c = static_cast<const float*>(args.partials.clamped)[p];
    kl += static_cast<const float*>(args.partials.kl)[p];
    clamped += c;
    weighed += at(knobs.beta, p / pieces.per_sample) * c;
  }
  s = block_sum(s);
  kl = block_sum(kl);
  clamped = block_sum(clamped);
  weighed = block_sum(weighed);

  const double gap = knobs.has_capacity ? capacity_gap(knobs, clamped, size) : 0;
  const Gradients& out = args.grads.gradients;
  if (out.beta.base && out.beta_each) {
    for (int64_t i = threadIdx.x; i < batch.size; i += blockDim.x) {
      double own = 0;
      for (int64_t p = 0; p < pieces.per_sample; ++p) {
        own += static_cast<const float*>(args.partials.clamped)[i * pieces.per_sample + p];
      }
      put<float>(out.beta, i, w * (knobs.has_capacity ? ::fabs(gap) : own));
    }
  }
  if (threadIdx.x != 0) return;
  const Sigma sigma = optimal_sigma(s, n, knobs.min_log_sigma, knobs.softclip);
  const double nats = scale * distortion(s, n, sigma);
  const double penalty = knobs.has_capacity ? size * at(knobs.beta, 0) * ::fabs(gap) : weighed;
  *static_cast<float*>(args.outputs.loss) = static_cast<float>(nats + scale * penalty);
  *static_cast<float*>(args.outputs.distortion) = static_cast<float>(nats);
  *static_cast<float*>(args.outputs.rate) = static_cast<float>(scale * kl);
  *static_cast<float*>(args.outputs.sigma) = static_cast<float>(::exp(sigma.log_sigma));
  const double slopes = w * distortion_slope(s, n, sigma.inverse_variance);
  args.agreed[0] = w * sigma.inverse_variance + through_shared_sigma(sigma, slopes, s);
  args.agreed[1] = gap;
  if (out.beta.base && !out.beta_each) put<float>(out.beta, 0, w * (knobs.has_capacity ? size * ::fabs(gap) : clamped));
}

__device__ inline void latent_role(const StepArguments& args) {
  const Batch& batch = args.grads.batch;
  const Knobs& knobs = args.grads.knobs;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int64_t index = warp_of_blocks(args.plan.data_blocks), warps = warps_of_blocks(args.plan.latent_blocks);
  for_pieces(
      batch, false, true, index, warps, [&](const Piece& piece) { write_rates<float>(batch, args.partials, piece); });
  grid.sync();
  if (blockIdx.x == gridDim.x - 1) lead(args);
  grid.sync();
  const double gap = args.agreed[1];
  for_pieces(batch, false, args.grads.with_latents, index, warps, [&](const Piece& piece) {
    const Weight weight = {args.grads.scale * at(args.grads.grad_outputs.loss, 0), 0, 0};
    Factors f = {0, weight.loss * at(knobs.beta, piece.sample), 0, 0, 0};
    if (knobs.has_capacity) limit_by_capacity(f, weight, gap);
    latent_gradient<float>(batch.latents, args.grads.gradients, static_cast<float>(f.through_loss), 0.0f, piece);
  });
}

template <class R, class T>
__device__ void run_step(const StepArguments& args) {
  static_cast<int>(blockIdx.x) < args.plan.data_blocks ? data_role<R, T>(args) : latent_role(args);
}

template <class R, class T>
__global__ void __launch_bounds__(kStepThreads, 1) elbo_step_kernel(StepArguments args) {
  run_step<R, T>(args);
}

}  // namespace elbo
