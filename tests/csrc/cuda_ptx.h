// A training step on contiguous tensors, as the arguments that an executor of PTX can be given: pointers and numbers,
// no structures.
#pragma once

#include "cuda/elbo_step.cuh"
#include "cuda/elbo_step_each.cuh"

using namespace elbo;

namespace {

template <class T>
constexpr ScalarType kDtypeOf = ScalarType::Float;
template <>
constexpr ScalarType kDtypeOf<BFloat16> = ScalarType::BFloat16;

template <class T>
__device__ Span span_of(const T* base, int64_t elements) {
  return {reinterpret_cast<char*>(const_cast<T*>(base)), kDtypeOf<T>, sizeof(T), elements};
}

// What every kernel is told of the call, as the arguments of a wrapper.
template <class T>
struct Tensors {
  const T *recon, *target, *mu, *logvar;
  long long batch, dims, data_chunk, latents, latent_chunk;

  __device__ Chunks chunks(int64_t elements, int64_t size) const {
    const int64_t each = (elements + size - 1) / size;
    return {size, each, each * batch};
  }

  __device__ ChunkedBatch as_batch() const {
    ChunkedBatch b;
    b.size = batch;
    b.data.dims = dims;
    b.data_chunks = chunks(dims, data_chunk);
    b.data.recon = span_of(recon, dims);
    b.data.target = span_of(target, dims);
    b.latents.dims = latents;
    b.latent_chunks = chunks(latents, latent_chunk);
    b.latents.mu = span_of(mu, latents);
    b.latents.logvar = span_of(logvar, latents);
    return b;
  }

  __device__ Gradients gradients(T* g_recon, T* g_mu, T* g_logvar) const {
    Gradients g;
    g.recon = span_of(g_recon, dims);
    g.mu = span_of(g_mu, latents);
    g.logvar = span_of(g_logvar, latents);
    return g;
  }
};

__device__ Options options_of(double beta) {
  Options options;
  options.sigma_mode = kBatch;
  options.min_log_sigma = -7;
  options.beta.value = beta;
  options.reduction = kBatchMean;
  return options;
}

template <class T>
__device__ GradsArguments
grads_of(const Tensors<T>& t, const float* stats, double beta, double grad_scale, T* g_recon, T* g_mu, T* g_logvar) {
  const GradOutputs outputs = {{{}, grad_scale}, {}, {}};
  return {t.as_batch(), 1.0 / t.batch, stats, options_of(beta), outputs, t.gradients(g_recon, g_mu, g_logvar),
          true,         true};
}

}  // namespace

#define TENSORS(T)                                                                                \
  const T *recon, const T *target, const T *mu, const T *logvar, long long batch, long long dims, \
      long long data_chunk, long long latents, long long latent_chunk
#define GIVEN(T)                                                              \
  Tensors<T> {                                                                \
    recon, target, mu, logvar, batch, dims, data_chunk, latents, latent_chunk \
  }
