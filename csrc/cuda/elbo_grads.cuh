// Stage three: the gradients, each element a factor of its sample times what the formula says, in one pass.
#pragma once

#include "elbo_finalize.cuh"
#include "mixed.cuh"

namespace elbo {

struct GradsArguments {
  ChunkedBatch batch;
  double scale;  // the reduction's weight, unless it depends on the elements' weights
  const void* stats;
  Options options;
  GradOutputs grad_outputs;
  Gradients gradients;
  bool with_data, with_latents;  // some gradient of the data's, of the latents' is wanted
};

// ---------------------------------------------------------------------------------------------- O(B): the prologue

// The numbers of the batch that every sample's factors need.
struct BatchTerms {
  double total;         // Σ A
  double mean_rate;     // which a limit per batch is held against
  double shared_sigma;  // what reaches every difference through a σ that the batch shares
};

// In a step, where the loss alone has a gradient.
__device__ inline Weight loss_weight(const GradsArguments& args, int64_t i) {
  return {args.scale * at(args.grad_outputs.loss, i), 0, 0};
}

// How many elements sample i has, or the sum of their weights; the batch is the last one.
template <class A>
__device__ double elements_of(const GradsArguments& args, int64_t i) {
  const Batch& batch = args.batch;
  if (batch.data.has_weight) return static_cast<const A*>(args.stats)[3 * (batch.size + 1) + i];
  return static_cast<double>(batch.data.dims) * (i == batch.size ? static_cast<double>(batch.size) : 1.0);
}

template <class A>
__device__ double scale_of(const GradsArguments& args) {
  if (!args.batch.data.has_weight) return args.scale;
  return reduction_weight(args.options, args.batch, elements_of<A>(args, args.batch.size));
}

template <class A>
__device__ Factors factors_of(const GradsArguments& args, const BatchTerms& terms, int64_t i) {
  const A* stats = static_cast<const A*>(args.stats);
  const double a = stats[i], clamped = stats[2 * (args.batch.size + 1) + i], dims = elements_of<A>(args, i);
  const Weight weight = weight_of(scale_of<A>(args), args.grad_outputs, i);
  const Sigma sigma = sigma_of(args.options, i, a, terms.total, elements_of<A>(args, args.batch.size), dims);
  Factors f = factors_of(args.options, sigma, i, a, clamped, dims, terms.mean_rate, weight);
  f.recon_scale += terms.shared_sigma;
  return f;
}

template <class A>
__device__ void put(const Span& to, int64_t i, double value) {
  store_any(to, to.at(0, i), 0, Count<1>{}, [value](int) { return static_cast<A>(value); });
}

// ∂L/∂A_i, or their sum where all samples have the same extra error. By a whole block.
template <class A>
__device__ void put_extra_error(const GradsArguments& args, const BatchTerms& terms) {
  const Gradients& out = args.gradients;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < args.batch.size; i += blockDim.x) {
    const double own = factors_of<A>(args, terms, i).recon_scale / args.options.q;
    sum += own;
    if (out.extra_error_each) put<A>(out.extra_error, i, own);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0 && !out.extra_error_each) put<A>(out.extra_error, 0, sum);
}

// By the whole block. The first block also writes the gradients that are O(batch).
template <class A>
__device__ BatchTerms prologue(const GradsArguments& args) {
  const A* stats = static_cast<const A*>(args.stats);
  const Gradients& out = args.gradients;
  const int64_t row = args.batch.size + 1;
  BatchTerms terms = {static_cast<double>(stats[row - 1]), 0, 0};
  if (limits_batch(args.options.limit_mode)) {
    terms.mean_rate = static_cast<double>(stats[3 * row - 1]) / static_cast<double>(args.batch.size);
  }

  const bool small = blockIdx.x == 0 && (out.log_sigma.base || out.beta.base);
  const bool alike = weighs_alike(args.grad_outputs);
  const bool is_shared = args.options.sigma_mode == kBatch;
  double slopes = 0, beta = 0;  // Σ_j w_j (D − A_j/σ^q), which is also the gradient of a given log σ; and β's gradient
  if (small || (is_shared && !alike)) {
    for (int64_t i = threadIdx.x; i < args.batch.size; i += blockDim.x) {
      const Factors f = factors_of<A>(args, terms, i);
      slopes += f.log_sigma;
      beta += f.beta;
      if (small && out.log_sigma.base && out.log_sigma_each) put<A>(out.log_sigma, i, f.log_sigma);
      if (small && out.beta.base && out.beta_each) put<A>(out.beta, i, f.beta);
    }
    slopes = block_sum(slopes);
    beta = block_sum(beta);
    if (small && threadIdx.x == 0 && out.log_sigma.base && !out.log_sigma_each) put<A>(out.log_sigma, 0, slopes);
    if (small && threadIdx.x == 0 && out.beta.base && !out.beta_each) put<A>(out.beta, 0, beta);
  }
  if (is_shared) {
    const double elements = elements_of<A>(args, args.batch.size);
    const Sigma sigma = sigma_of(args.options, 0, 0, terms.total, elements, 0);
    if (alike) {
      const Weight weight = weight_of(scale_of<A>(args), args.grad_outputs, 0);
      slopes = (weight.loss + weight.distortion) * distortion_slope(terms.total, elements, sigma.inverse_scale);
    }
    terms.shared_sigma = shared_sigma_term(sigma, slopes, terms.total);
  }
  if (blockIdx.x == 0 && out.extra_error.base) put_extra_error<A>(args, terms);
  return terms;
}

// ------------------------------------------------------------------------------------------------------- elements

template <class T>
__device__ T* begin_of(const Span& span, const Chunk& p) {
  return span.base ? reinterpret_cast<T*>(span.at(p.sample, p.first)) : nullptr;
}

// The gradient of a log σ that the chunk's elements share. lanes: the sum of each lane's.
template <class A>
__device__ void put_segment(const Gradients& out, const Chunk& p, A lanes) {
  if (out.segment_log_sigma == nullptr) return;
  const A sum = warp_sum(lanes);
  if (lane() == 0) static_cast<A*>(out.segment_log_sigma)[p.index] = sum;
}

template <class A, class R, bool Own, Order Way>
__device__ MixedSums<A> mixed_gradient(const Data& data, const Gradients& out, A a, const Chunk& p) {
  const MixedChunk<A, R, Own> elements(data, p.sample, p.first);
  const MixedWritten to(out, data.dims, p);
  A of_log_sigma = 0;
  const auto sums = mixed_sums<Way>(elements, p.n, to.head(elements, p.n), a, [&](int i, const auto& g, auto count) {
    to.template put<R>(i, g, count);
    if constexpr (Own) {
#pragma unroll
      for (int j = 0; j < count.n; ++j) of_log_sigma += g.log_sigma.value[j];
    }
  });
  if constexpr (Own) put_segment(out, p, of_log_sigma);
  return sums;
}

template <class A, class R, class T, bool Element>
__device__ void data_gradient(const Data& data, const Gradients& out, A a, const Chunk& p) {
  using Elements = DataChunk<A, R, T, Element>;
  const Elements elements(data, p.sample, p.first);
  R* g_recon = begin_of<R>(out.recon, p);
  T* g_target = begin_of<T>(out.target, p);
  const bool exact = out.element_log_sigma.itemsize == sizeof(A);
  T* g_log_sigma = exact ? nullptr : begin_of<T>(out.element_log_sigma, p);
  A* g_exact = exact ? begin_of<A>(out.element_log_sigma, p) : nullptr;
  const int head = elements.head(p.n, g_recon, g_target, g_log_sigma, g_exact);
  A of_log_sigma = 0;
  walk<Elements::Turns, Elements::V, Order::kBackward>(
      p.n, head, [&](int i, auto count) { return elements.load(i, count); },
      [&](int i, const auto& fetched, auto count) {
        DistortionGrad<A> g[count.n];
#pragma unroll
        for (int j = 0; j < count.n; ++j) {
          if constexpr (Element) {
            g[j] = distortion_grad<2>(a, fetched.error(j), fetched.log_sigma.value[j]);
          } else {
            g[j].recon = scaled_slope<2>(a, fetched.error(j));
          }
        }
        if (g_recon) store_values(g_recon + i, count, [&](int j) { return g[j].recon; });
        if (g_target) store_values(g_target + i, count, [&](int j) { return -g[j].recon; });
        if constexpr (Element) {
          if (g_log_sigma) store_values(g_log_sigma + i, count, [&](int j) { return g[j].log_sigma; });
          if (g_exact) store_values(g_exact + i, count, [&](int j) { return g[j].log_sigma; });
#pragma unroll
          for (int j = 0; j < count.n; ++j) of_log_sigma += g[j].log_sigma;
        }
      });
  if constexpr (Element) put_segment(out, p, of_log_sigma);
}

template <class A>
__device__ void latent_gradient(
    const Latents& latents, const Gradients& out, A grad_kl_clamped, A grad_kl, const Chunk& p) {
  const LatentChunk<A> elements(latents, p);
  const LatentPart mu(out.mu, p), logvar(out.logvar, p);
  const LatentPart prior_mu(out.prior_mu, p), prior_logvar(out.prior_logvar, p);
  const int vector =
      min(min(elements.vector(), min(mu.vector(), logvar.vector())), min(prior_mu.vector(), prior_logvar.vector()));
  const A free_bits = static_cast<A>(latents.free_bits);
  elements.walk(
      p.n, vector,
      [&](auto& held, int i, auto count) {
        const auto values = elements.take(held, i, count);
        KlGrad<A> g[count.n];
#pragma unroll
        for (int j = 0; j < count.n; ++j) {
          A b = grad_kl_clamped + grad_kl;
          if (free_bits > 0) b = grad_kl + (elements.nats(values, j) >= free_bits ? grad_kl_clamped : A(0));
          const A m = values.mu.value[j], l = values.logvar.value[j];
          g[j] = latents.has_prior ? kl_grad<A>(b, m, l, values.prior_mu.value[j], values.prior_logvar.value[j])
                                   : kl_grad<A>(b, m, l);
          if (latents.has_range) g[j].logvar = elements.range_grad(g[j].logvar, values, j);
        }
        mu.put(held.mu, i, count, [&](int j) { return g[j].mu; });
        logvar.put(held.logvar, i, count, [&](int j) { return g[j].logvar; });
        prior_mu.put(held.prior_mu, i, count, [&](int j) { return g[j].prior_mu; });
        prior_logvar.put(held.prior_logvar, i, count, [&](int j) { return g[j].prior_logvar; });
      },
      [&](const auto& held, int i) {
        mu.write(held.mu, i, vector);
        logvar.write(held.logvar, i, vector);
        prior_mu.write(held.prior_mu, i, vector);
        prior_logvar.write(held.prior_logvar, i, vector);
      });
}

template <class A, class R, class T, bool Element>
__device__ void run_grads(const GradsArguments& args) {
  __shared__ BatchTerms terms;  // not in registers, which would then not be enough for three blocks
  const BatchTerms own = prologue<A>(args);
  if (threadIdx.x == 0) terms = own;
  __syncthreads();
  for_chunks<Order::kBackward>(
      args.batch, args.with_data, args.with_latents, warp_of_blocks(0), warps_of_blocks(gridDim.x),
      [&](const Chunk& chunk) {
        const Factors f = factors_of<A>(args, terms, chunk.sample);
        if (chunk.is_data) {
          const A a = static_cast<A>(f.recon_scale);
          if constexpr (kIsMixed<T>) {
            mixed_gradient<A, R, Element, Order::kBackward>(args.batch.data, args.gradients, a, chunk);
          } else {
            data_gradient<A, R, T, Element>(args.batch.data, args.gradients, a, chunk);
          }
        } else {
          const A grad_kl_clamped = static_cast<A>(f.grad_kl_clamped), grad_kl = static_cast<A>(f.grad_kl);
          latent_gradient<A>(args.batch.latents, args.gradients, grad_kl_clamped, grad_kl, chunk);
        }
      });
}

// Of the plain kernel, on an SM: three, for what they have in flight; code for newer GPUs would spill then.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kGradsBlocks = 2;
#else
constexpr int kGradsBlocks = 3;
#endif

template <class A, class R, class T, bool Element>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, Element ? 2 : kGradsBlocks>)
    elbo_grads_kernel(GradsArguments args) {
  run_grads<A, R, T, Element>(args);
}

}  // namespace elbo
