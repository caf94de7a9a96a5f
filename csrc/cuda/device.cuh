// What the kernels share: sums over a warp and a block, and elements read and written 128 bits at a time.
#pragma once

#include <type_traits>

#include "launch.h"

namespace elbo {

__device__ inline int lane() {
  return static_cast<int>(threadIdx.x) % kWarpSize;
}

__device__ inline int warp() {
  return static_cast<int>(threadIdx.x) / kWarpSize;
}

// -------------------------------------------------------------------------------------------------------------- sums

// Over groups of `lanes` neighbours, a power of two. Every lane gets the sum, with the same bits: a + b is b + a.
template <class A>
__device__ inline A warp_sum(A x, int lanes = kWarpSize) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Over the block, for every thread, in an order that only the number of threads decides.
__device__ inline double block_sum(double x) {
  __shared__ double warps[1024 / kWarpSize];
  x = warp_sum(x);
  if (lane() == 0) warps[warp()] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) sum += warps[w];
  __syncthreads();  // or the next call would overwrite what a slow warp has yet to read
  return sum;
}

// ----------------------------------------------------------------------------------------------------------- elements

// A number of elements known when compiling, as an argument.
template <int N>
struct Count {
  static constexpr int n = N;
};

// N neighbours as they lie in memory, moved by as few accesses as there can be.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Few {
  T value[N];
};

template <int Bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

template <class T, int N>
__device__ inline Few<T, N> load(const T* p, Count<N>) {
  Few<T, N> few;
  if constexpr (N == 1) {
    few.value[0] = *p;
  } else {
    using Word = typename WordOf<alignof(Few<T, N>)>::type;
#pragma unroll
    for (unsigned k = 0; k < sizeof few / sizeof(Word); ++k) {
      reinterpret_cast<Word*>(&few)[k] = reinterpret_cast<const Word*>(p)[k];
    }
  }
  return few;
}

template <class T, int N>
__device__ inline void store(T* p, const Few<T, N>& few) {
  if constexpr (N == 1) {
    *p = few.value[0];
  } else {
    using Word = typename WordOf<alignof(Few<T, N>)>::type;
#pragma unroll
    for (unsigned k = 0; k < sizeof few / sizeof(Word); ++k) {
      reinterpret_cast<Word*>(p)[k] = reinterpret_cast<const Word*>(&few)[k];
    }
  }
}

// The values f(j) of N neighbours, rounded once to T.
template <class T, int N, class F>
__device__ inline void store_values(T* p, Count<N>, F f) {
  Few<T, N> few;
#pragma unroll
  for (int j = 0; j < N; ++j) few.value[j] = static_cast<T>(f(j));
  store(p, few);
}

// Elements of a dtype known only at run time, for what is small beside the data.
template <class A, int N>
struct Values {
  A value[N];
};

template <class A, int N>
__device__ inline Values<A, N> load_any(const Span& span, const char* at, int i, Count<N> count) {
  Values<A, N> out;
  with_floating(span.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto few = load(reinterpret_cast<const T*>(at) + i, count);
#pragma unroll
    for (int j = 0; j < N; ++j) out.value[j] = static_cast<A>(few.value[j]);
  });
  return out;
}

template <int N, class F>
__device__ inline void store_any(const Span& span, char* at, int i, Count<N> count, F f) {
  with_floating(span.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    store_values(reinterpret_cast<T*>(at) + i, count, f);
  });
}

// The neighbours of such a tensor that one access moves, 4, 8 or 16 bytes, as they lie in memory. They have their turns
// two by two, and what comes of them, of the same dtype, takes their place: eight of a half dtype of each of four
// tensors, and of their gradients, would be too many for the registers as floats. For that the turns must be a loop
// that is not unrolled.
struct Packed {
  Few<uint32_t, 4> words;  // the next turn's in front, what came of the last one at the back

  __device__ void read(const char* at, int64_t bytes) {
    if (bytes == 16) {
      words = load(reinterpret_cast<const uint32_t*>(at), Count<4>{});
    } else if (bytes == 8) {
      const auto two = load(reinterpret_cast<const uint32_t*>(at), Count<2>{});
      words.value[0] = two.value[0];
      words.value[1] = two.value[1];
    } else {
      words.value[0] = *reinterpret_cast<const uint32_t*>(at);
    }
  }

  __device__ void write(char* at, int64_t bytes) const {
    if (bytes == 16) {
      store(reinterpret_cast<uint32_t*>(at), words);
    } else if (bytes == 8) {
      store(reinterpret_cast<uint32_t*>(at), Few<uint32_t, 2>{words.value[2], words.value[3]});
    } else {
      *reinterpret_cast<uint32_t*>(at) = words.value[3];
    }
  }

  template <class A>
  __device__ Values<A, 2> take(ScalarType dtype) {
    Values<A, 2> out;
    with_floating(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int n = sizeof(T) / 2;  // words of two elements
      Few<T, 2> few;
#pragma unroll
      for (int k = 0; k < n; ++k) reinterpret_cast<uint32_t*>(&few)[k] = words.value[k];
#pragma unroll
      for (int k = n; k < 4; ++k) words.value[k - n] = words.value[k];
#pragma unroll
      for (int j = 0; j < 2; ++j) out.value[j] = static_cast<A>(few.value[j]);
    });
    return out;
  }

  template <class F>
  __device__ void put(ScalarType dtype, F f) {
    with_floating(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int n = sizeof(T) / 2;
      Few<T, 2> few;
#pragma unroll
      for (int j = 0; j < 2; ++j) few.value[j] = static_cast<T>(f(j));
#pragma unroll
      for (int k = 0; k < n; ++k) words.value[4 - n + k] = reinterpret_cast<const uint32_t*>(&few)[k];
    });
  }
};

// -------------------------------------------------------------------------------------------------------------- walks

__device__ inline bool aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Elements before the first one at which all of the pointers are on 128 bits; n if there is none, or too few. A null
// pointer agrees with any.
template <class R, class... Others>
__device__ inline int head_of(int n, const R* first, const Others*... others) {
  const int head = static_cast<int>((16 - reinterpret_cast<uintptr_t>(first) % 16) % 16 / sizeof(R));
  return head < n && ((others == nullptr || aligned(others + head, 16)) && ...) ? head : n;
}

// One warp over `groups` groups of N elements, Turns loads of each tensor asked for before the first is used. `at(g)`
// is where group g begins, `load(i, count)` fetches elements i, …, i + N − 1, `use(i, fetched, count)` takes them.
// Groups that fill no round of turns have a loop of their own: behind a condition, what a load leaves unset would keep
// its registers through all of the kernel, the latents too. Unrolled further, the loops would take more of them.
template <int Turns, int N, class At, class Load, class Use>
__device__ inline void walk_groups(int groups, Count<N> count, At at, Load load, Use use) {
  int first = lane();
#pragma unroll 1
  for (; first + (Turns - 1) * kWarpSize < groups; first += Turns * kWarpSize) {
    decltype(load(0, count)) fetched[Turns];
#pragma unroll
    for (int k = 0; k < Turns; ++k) fetched[k] = load(at(first + k * kWarpSize), count);
#pragma unroll
    for (int k = 0; k < Turns; ++k) use(at(first + k * kWarpSize), fetched[k], count);
  }
#pragma unroll 1
  for (; first < groups; first += kWarpSize) use(at(first), load(at(first), count), count);
}

// The order of a walk. The second pass over the data begins where the first one ended: that is what L2 still holds.
enum class Order { kForward, kBackward };

template <Order Way, class Index>
__device__ inline Index nth(Index i, Index n) {
  return Way == Order::kForward ? i : n - 1 - i;
}

// One warp over the elements [0, n): N at a time from `head` on, one by one before it and after the last full vector.
template <int Turns, int N, Order Way = Order::kForward, class Load, class Use>
__device__ inline void walk(int n, int head, Load load, Use use) {
  const int vectors = (n - head) / N, between = vectors * N;
  walk_groups<Turns>(vectors, Count<N>{}, [=](int g) { return head + nth<Way>(g, vectors) * N; }, load, use);
  walk_groups<Turns>(n - between, Count<1>{}, [=](int g) { return g < head ? g : g + between; }, load, use);
}

// A chunk of a sample: elements first, …, first + n − 1 of the data's or the latents'.
struct Chunk {
  bool is_data;
  int64_t index, sample, first;
  int n;
};

// Calls f(chunk) for those that are this warp's: one in `warps`, from the index-th on. Data and latents share one
// numbering, so that one launch does both; Way: of the data.
template <Order Way = Order::kForward, class F>
__device__ inline void for_chunks(
    const ChunkedBatch& batch, bool with_data, bool with_latents, int64_t index, int64_t warps, F f) {
  const int64_t of_data = with_data ? batch.data_chunks.count : 0;
  const int64_t all = of_data + (with_latents ? batch.latent_chunks.count : 0);
  for (int64_t i = index; i < all; i += warps) {
    const bool is_data = i < of_data;
    const Chunks& chunks = is_data ? batch.data_chunks : batch.latent_chunks;
    const int64_t dims = is_data ? batch.data.dims : batch.latents.dims;
    const int64_t own = is_data ? nth<Way>(i, of_data) : i - of_data;
    const int64_t sample = own / chunks.per_sample, first = own % chunks.per_sample * chunks.size;
    f(Chunk{is_data, own, sample, first, static_cast<int>(min(dims - first, chunks.size))});
  }
}

// Of this warp among all of those of some blocks, the first of which is `begin`.
__device__ inline int64_t warp_of_blocks(int begin) {
  return static_cast<int64_t>(static_cast<int>(blockIdx.x) - begin) * (blockDim.x / kWarpSize) + warp();
}

__device__ inline int64_t warps_of_blocks(int blocks) {
  return static_cast<int64_t>(blocks) * (blockDim.x / kWarpSize);
}

}  // namespace elbo
