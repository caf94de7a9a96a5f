// The kernels of the aggregate posterior by name, on contiguous tensors, see test_cuda_ptx_aggregate.py.
#include "cuda/aggregate.cuh"
#include "cuda/aggregate_grads.cuh"

using namespace elbo;

namespace {

template <class T>
constexpr ScalarType kDtypeOf = ScalarType::Float;
template <>
constexpr ScalarType kDtypeOf<BFloat16> = ScalarType::BFloat16;

template <class T>
__device__ Matrix matrix_of(const T* base, int64_t rows, int64_t columns) {
  return {{reinterpret_cast<char*>(const_cast<T*>(base)), kDtypeOf<T>, sizeof(T), columns}, rows, columns, 1};
}

// What every kernel with tiles is told of the call.
template <class T>
struct Given {
  const T *z, *mu, *logvar;
  long long batch, components, latents, own;
  double log_own, log_others;

  __device__ AggregateArguments arguments(const AggregateCut& cut, float* partials) const {
    const MixtureOf mixture = {
        matrix_of(z, batch, latents),
        matrix_of(mu, components, latents),
        matrix_of(logvar, components, latents),
        own,
        {log_own, log_others}};
    return {mixture, {}, cut, nullptr, partials};
  }

  __device__ AggregateArguments arguments(
      const AggregateCut& cut, const float* joint, const float* marginals, const float* grad_joint,
      const float* grad_marginals, float* partials) const {
    AggregateArguments args = arguments(cut, partials);
    args.given = {
        matrix_of(joint, batch, 1), matrix_of(marginals, batch, latents), matrix_of(grad_joint, batch, 1),
        matrix_of(grad_marginals, batch, latents)};
    return args;
  }
};

}  // namespace

#define MIXTURE(T)                                                                                                   \
  const T *z, const T *mu, const T *logvar, long long batch, long long components, long long latents, long long own, \
      double log_own, double log_others
#define GIVEN(T)                                                        \
  Given<T> {                                                            \
    z, mu, logvar, batch, components, latents, own, log_own, log_others \
  }
#define CUT long long lane_blocks, long long tiles, long long segments, int of_warp, int warps, int groups
#define AS_CUT {lane_blocks, tiles, segments, of_warp, warps, groups}
#define SUMS const float *joint, const float *marginals, const float *grad_joint, const float *grad_marginals

#define KERNELS(name, T)                                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads) sums_##name(MIXTURE(T), CUT, float* partials) {               \
    run_aggregate<float>(GIVEN(T).arguments(AS_CUT, partials));                                                        \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads) points_##name(MIXTURE(T), CUT, SUMS, float* partials) {       \
    const auto args = GIVEN(T).arguments(AS_CUT, joint, marginals, grad_joint, grad_marginals, partials);              \
    run_aggregate_grads<float, OfPoints<float>>(args);                                                                 \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads) components_##name(MIXTURE(T), CUT, SUMS, float* partials) {   \
    const auto args = GIVEN(T).arguments(AS_CUT, joint, marginals, grad_joint, grad_marginals, partials);              \
    run_aggregate_grads<float, OfComponents<float>>(args);                                                             \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads) total_##name(                                                 \
      const float* partials, long long segments, int lanes, double factor, long long rows, long long columns, T* to) { \
    run_grad_sums<float>({{{partials, segments, factor, matrix_of(to, rows, columns)}, {}, {}}, lanes});               \
  }

KERNELS(fp32, float)
KERNELS(bf16, BFloat16)

extern "C" __global__ void __launch_bounds__(kThreads) log_sums(
    const float* partials, long long segments, int lanes, double log_others, long long batch, long long latents,
    float* joint, float* marginals) {
  run_log_sums<float>(
      {segments, lanes, log_others, partials, matrix_of(joint, batch, 1), matrix_of(marginals, batch, latents)});
}
