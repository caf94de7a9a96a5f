// The one way kernels are launched, and the choice of a kernel by dtype.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "elbo.h"

namespace elbo {

// Blocks that the compiler is to leave registers for on an SM: three leave 80 to a thread, two 128. fp64, for gradient
// checks, needs more.
template <class A, int Blocks>
constexpr int kLeastBlocks = sizeof(A) == 4 ? Blocks : 1;

// In PyTorch's words: trainers know "CUDA" and "out of memory".
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error) + " (fused_elbo: " + what + ")");
}

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&value, which, device), "no such attribute of the device");
  return value;
}

inline int multiprocessors() {
  return attribute(cudaDevAttrMultiProcessorCount);
}

// Bytes of shared memory that a block may ask for, less what the kernels have besides: a block's sums.
inline int64_t shared_for_differences() {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024;
}

// How many blocks of a kernel the device runs at once.
template <class Kernel>
inline int64_t blocks_at_once(Kernel kernel, int threads, int64_t shared_bytes) {
  int blocks = 0;
  const int shared = static_cast<int>(shared_bytes);
  if (shared > 0)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "no such shared memory");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared), "no occupancy");
  return static_cast<int64_t>(blocks) * multiprocessors();
}

// cooperative: every block is on the device at once, or the launch fails.
template <class Arguments>
inline void launch(
    const char* name, void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads,
    cudaStream_t stream, int64_t shared_bytes = 0, bool cooperative = false) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  const auto run = cooperative ? cudaLaunchCooperativeKernel<void(Arguments)> : cudaLaunchKernel<void(Arguments)>;
  check(run(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers, shared_bytes, stream), name);
}

template <class Compute, class Recon, class Target>
struct Types {
  using A = Compute;
  using R = Recon;
  using T = Target;
};

// Calls f(Types<compute type, recon's, target's>).
template <class F>
inline void with_types(const Batch& batch, F f) {
  const auto target_like = [&](auto* half) {
    using H = std::remove_pointer_t<decltype(half)>;
    batch.data.target.dtype == ScalarType::Float ? f(Types<float, H, float>{}) : f(Types<float, H, H>{});
  };
  if (batch.is_double) return f(Types<double, double, double>{});
  switch (batch.data.recon.dtype) {
    case ScalarType::BFloat16:
      return target_like(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return target_like(static_cast<Half*>(nullptr));
    default:
      return f(Types<float, float, float>{});
  }
}

}  // namespace elbo
