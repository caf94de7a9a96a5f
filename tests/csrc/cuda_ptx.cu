// The kernels of a training step by name, see test_cuda_ptx.py: with σ = √MSE of the batch, but for given_… (σ = 1) and
// image_… (each sample's own).
#include "cuda_ptx.h"

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
