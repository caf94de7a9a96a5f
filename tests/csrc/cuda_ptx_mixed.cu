// The kernels of a training step with all that may be asked for: bytes for a target, q = 1, an activation, an extra
// error, logvar in a range; a mask in two passes and where σ is given, a capacity where the batch shares σ. See
// test_cuda_ptx.py.
#include "cuda_ptx.h"

namespace {

__device__ Options mixed(Options options) {
  options.q = 1;
  options.extra_error.value = 7;
  options.limit_mode = kBatchCapacity;
  options.limit.value = 1000;
  return options;
}

// Without `mask` there is none. `no_target` is null, which the compiler must not know: it would make other code.
template <class T>
__device__ GradsArguments
mixed(GradsArguments args, const uint8_t* bytes, const uint8_t* mask, T* no_target, long long activation) {
  args.gradients.target = span_of(no_target, args.batch.data.dims);
  Data& data = args.batch.data;
  data.target = {reinterpret_cast<char*>(const_cast<uint8_t*>(bytes)), ScalarType::Byte, 1, data.dims};
  data.target_step = 2.0 / 255;
  data.target_low = -1;
  data.exponent = 1;
  data.activation = activation;
  args.options = mixed(args.options);
  args.batch.latents.has_range = true;
  args.batch.latents.logvar_min = -0.5;
  args.batch.latents.logvar_max = 0.5;
  if (mask == nullptr) return args;
  data.has_weight = true;
  data.weight.values = {reinterpret_cast<char*>(const_cast<uint8_t*>(mask)), ScalarType::Bool, 1, data.dims};
  return args;
}

}  // namespace

#define MIXED_ARGUMENTS(T)                                                                                \
  TENSORS(T), const uint8_t *bytes, const uint8_t *mask, T *no_target, long long activation, double beta, \
      double grad_scale
#define WITH_MASK(T, stats) \
  mixed(grads_of(GIVEN(T), stats, beta, grad_scale, g_recon, g_mu, g_logvar), bytes, mask, no_target, activation)

#define MIXED(name, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                            \
      stats_##name(MIXED_ARGUMENTS(T), float* s, float* kl, float* weights, T* g_recon, T* g_mu, T* g_logvar) {     \
    run_stats<float, T, Mixed, true>({WITH_MASK(T, nullptr).batch, {s, kl, kl, weights}});                          \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                            \
      grads_##name(MIXED_ARGUMENTS(T), const float* stats, T* g_recon, T* g_mu, T* g_logvar) {                      \
    run_grads<float, T, Mixed, true>(WITH_MASK(T, stats));                                                          \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(kStepThreads)                                                        \
      given_##name(MIXED_ARGUMENTS(T), float* s, float* kl, float* weights, T* g_recon, T* g_mu, T* g_logvar) {     \
    StepEachArguments args = {WITH_MASK(T, nullptr), {s, kl, kl, weights}, 0};                                      \
    args.grads.options.sigma_mode = kGiven;                                                                         \
    args.grads.options.limit_mode = kNoLimit;                                                                       \
    run_step_each<T, Mixed, false>(args);                                                                           \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(kStepThreads)                                                        \
      image_##name(MIXED_ARGUMENTS(T), int data_blocks, float* s, float* kl, T* g_recon, T* g_mu, T* g_logvar) {    \
    mask = nullptr;                                                                                                 \
    StepEachArguments args = {WITH_MASK(T, nullptr), {s, kl, kl}, data_blocks};                                     \
    args.grads.options.sigma_mode = kImage;                                                                         \
    args.grads.options.limit_mode = kNoLimit;                                                                       \
    run_step_each<T, Mixed, true>(args);                                                                            \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(kStepThreads) step_##name(                                           \
      MIXED_ARGUMENTS(T), int data_blocks, int rows, float* kl, double* workspace, float* out, T* g_recon, T* g_mu, \
      T* g_logvar) {                                                                                                \
    mask = nullptr;                                                                                                 \
    run_step<T, Mixed>(                                                                                             \
        {WITH_MASK(T, nullptr),                                                                                     \
         {out, out + 1, out + 2, out + 3, false, nullptr},                                                          \
         {nullptr, kl, kl},                                                                                         \
         {true, data_blocks, 1, rows, 0},                                                                           \
         batch * dims,                                                                                              \
         workspace + 2,                                                                                             \
         workspace});                                                                                               \
  }

MIXED(fp32, float)
MIXED(bf16, BFloat16)

extern "C" __global__ void __launch_bounds__(kFinalizeThreads) finalize(
    long long batch, long long dims, long long data_chunks, long long latent_chunks, double beta, float* s, float* kl,
    float* weights, float* out, float* stats) {
  run_finalize<float>(
      {batch,
       dims,
       1.0 / batch,
       {s, kl, kl, weights},
       data_chunks,
       latent_chunks,
       mixed(options_of(beta)),
       {out, out + 1, out + 2, out + 3, false, stats}});
}
