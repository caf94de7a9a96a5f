// The kernels behind names and arguments that an executor of PTX can be given: pointers and numbers, no structures.
// They are those of a training step on contiguous tensors, see test_cuda_ptx.py: with σ = √MSE of the batch, but for
// given_… (σ = 1) and image_… (each sample's own).
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

#define KERNELS(name, T)                                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads) stats_##name(TENSORS(T), float* s, float* kl) {               \
    run_stats<float, T, T, false>({GIVEN(T).as_batch(), {s, kl, kl}});                                                 \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                               \
      grads_##name(TENSORS(T), const float* stats, double beta, double grad_scale, T* g_recon, T* g_mu, T* g_logvar) { \
    run_grads<float, T, T, false>(grads_of(GIVEN(T), stats, beta, grad_scale, g_recon, g_mu, g_logvar));               \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kStepThreads) step_##name(                                              \
      TENSORS(T), double beta, double grad_scale, int data_blocks, int latent_blocks, int rows, float* kl,             \
      double* workspace, float* out, T* g_recon, T* g_mu, T* g_logvar) {                                               \
    run_step<T, T>(                                                                                                    \
        {grads_of(GIVEN(T), nullptr, beta, grad_scale, g_recon, g_mu, g_logvar),                                       \
         {out, out + 1, out + 2, out + 3, false, nullptr},                                                             \
         {nullptr, kl, kl},                                                                                            \
         {true, data_blocks, latent_blocks, rows, 0},                                                                  \
         batch * dims,                                                                                                 \
         workspace + 2,                                                                                                \
         workspace});                                                                                                  \
  }

#define STEPS_OF_EACH(name, kind, mode, own, T)                                                              \
  extern "C" __global__ void __launch_bounds__(kStepThreads) kind##_##name(                                  \
      TENSORS(T), double beta, double grad_scale, int data_blocks, float* s, float* kl, T* g_recon, T* g_mu, \
      T* g_logvar) {                                                                                         \
    StepEachArguments args = {                                                                               \
        grads_of(GIVEN(T), nullptr, beta, grad_scale, g_recon, g_mu, g_logvar), {s, kl, kl}, data_blocks};   \
    args.grads.options.sigma_mode = mode;                                                                    \
    run_step_each<T, T, own>(args);                                                                          \
  }

STEPS_OF_EACH(fp32, given, kGiven, false, float)
STEPS_OF_EACH(bf16, given, kGiven, false, BFloat16)
STEPS_OF_EACH(fp32, image, kImage, true, float)
STEPS_OF_EACH(bf16, image, kImage, true, BFloat16)

KERNELS(fp32, float)
KERNELS(bf16, BFloat16)

extern "C" __global__ void __launch_bounds__(kFinalizeThreads) finalize(
    long long batch, long long dims, long long data_chunks, long long latent_chunks, double beta, float* s, float* kl,
    float* out, float* stats) {
  run_finalize<float>(
      {batch,
       dims,
       1.0 / batch,
       {s, kl, kl},
       data_chunks,
       latent_chunks,
       options_of(beta),
       {out, out + 1, out + 2, out + 3, false, stats}});
}
