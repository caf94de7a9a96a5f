// The one way kernels are launched, and the choice of a kernel by dtype.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

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

// Without this a kernel has 48 kB at most.
template <class Kernel>
inline void allow_shared(Kernel kernel, int64_t bytes) {
  if (bytes == 0) return;
  const int shared = static_cast<int>(bytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "no such shared memory");
}

// How many blocks of a kernel the device runs at once.
template <class Kernel>
inline int64_t blocks_at_once(Kernel kernel, int threads, int64_t shared_bytes) {
  int blocks = 0;
  const int shared = static_cast<int>(shared_bytes);
  allow_shared(kernel, shared_bytes);
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

// The type of a target whose dtype is known only at run time, like all else that may be of an element: see
// mixed_elements.cuh.
struct Mixed {};

template <class T>
constexpr bool kIsMixed = std::is_same_v<T, Mixed>;

// Whether an element is more than the square of a difference, of two numbers or with a σ of its own.
inline bool is_mixed(const Data& data) {
  const bool more = data.exponent != 2 || data.activation != kNoActivation || data.has_weight;
  return data.dims != 0 && (more || data.target.dtype == ScalarType::Byte);
}

// Whether one pass can do with what it keeps of an element until the sample's factor a is known, u of recon's gradient
// a·u: the target's is −a·u unless there is an activation, and 0·u must be 0 for what has the weight 0.
inline bool keeps_slopes(const Data& data, const Gradients& gradients) {
  return !data.has_weight && !(data.activation != kNoActivation && gradients.target.base);
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
  const bool mixed = is_mixed(batch.data);
  const auto full = [&](auto* type) {
    using A = std::remove_pointer_t<decltype(type)>;
    mixed ? f(Types<A, A, Mixed>{}) : f(Types<A, A, A>{});
  };
  const auto half = [&](auto* type) {
    using H = std::remove_pointer_t<decltype(type)>;
    if (mixed) return f(Types<float, H, Mixed>{});
    batch.data.target.dtype == ScalarType::Float ? f(Types<float, H, float>{}) : f(Types<float, H, H>{});
  };
  if (batch.is_double) return full(static_cast<double*>(nullptr));
  switch (batch.data.recon.dtype) {
    case ScalarType::BFloat16:
      return half(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return half(static_cast<Half*>(nullptr));
    default:
      return full(static_cast<float*>(nullptr));
  }
}

}  // namespace elbo
