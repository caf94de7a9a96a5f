// Stands in for CUDA's header, so that a C++ compiler makes CPU code of csrc/cuda as it is: a block runs on an OS
// thread, its CUDA threads are fibers there, and memory of all kinds is the process's. block.h has the scheduler.
//
// A fiber runs until it meets the others, in __syncthreads, a shuffle or a barrier of the grid; then the schedule says
// who is next. What a kernel gets wrong by forgetting to meet shows in its numbers. A barrier that not all threads
// reach ends the launch with an error, and so does a vector that is not aligned. Memory is sequentially consistent: a
// missing fence is not seen.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ thread_local  // of a block's OS thread; in a function, that means static too

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

namespace shim {

// Which one runs of the faults that tests/mutants.py has written into the code; 0: none.
extern int mutant;

// What is wrong with an access of several words, or of interest to the tests.
void see(const void* p, size_t bytes);

// Words that one access moves.
template <int N>
struct alignas(N * sizeof(uint32_t)) Vector {
  uint32_t word[N];

  Vector& operator=(const Vector& other) {
    see(this, sizeof *this);
    see(&other, sizeof other);
    std::memcpy(word, other.word, sizeof word);
    return *this;
  }
};

}  // namespace shim

using uint2 = shim::Vector<2>;
using uint4 = shim::Vector<4>;

inline thread_local uint3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

// ------------------------------------------------------------------------------------------ what threads do together

namespace shim {

constexpr int kWarpSize = 32;

void meet_block();
void meet_warp();
void meet_grid();  // of a cooperative launch
char* exchange();  // 32 places of 16 bytes for the warp's next shuffle

}  // namespace shim

inline void __syncthreads() {
  shim::meet_block();
}

inline void __syncwarp() {
  shim::meet_warp();
}

template <class T>
inline T __shfl_xor_sync(unsigned, T x, int with) {
  static_assert(sizeof(T) <= 16, "a place has 16 bytes");
  const int lane = static_cast<int>(threadIdx.x) % shim::kWarpSize;
  char* places = shim::exchange();
  std::memcpy(places + 16 * lane, &x, sizeof x);
  shim::meet_warp();
  std::memcpy(&x, places + 16 * (lane ^ with), sizeof x);
  return x;
}

// ------------------------------------------------------------------------------------------------------- the runtime

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class Kernel>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

namespace shim {

// Runs body(argument) for each thread of each block.
cudaError_t launch(
    dim3 grid, dim3 block, void (*body)(const void*), const void* argument, size_t shared, bool cooperative);

template <class Arguments>
struct Call {
  void (*kernel)(Arguments);
  const Arguments* arguments;

  static void run(const void* self) {
    const Call* call = static_cast<const Call*>(self);
    call->kernel(*call->arguments);
  }
};

template <class Kernel>
struct Launch;

template <class Arguments>
struct Launch<void(Arguments)> {
  static cudaError_t run(
      void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments, size_t shared, bool cooperative) {
    const Call<Arguments> call = {kernel, static_cast<const Arguments*>(arguments[0])};
    return launch(grid, block, Call<Arguments>::run, &call, shared, cooperative);
  }
};

}  // namespace shim

template <class Kernel>
inline cudaError_t cudaLaunchKernel(
    Kernel* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return shim::Launch<Kernel>::run(kernel, grid, block, arguments, shared, false);
}

template <class Kernel>
inline cudaError_t cudaLaunchCooperativeKernel(
    Kernel* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return shim::Launch<Kernel>::run(kernel, grid, block, arguments, shared, true);
}
