// The data where an element is more than two numbers whose dtypes are known when compiling: |e| in the place of e², an
// activation, a weight, a target of bytes; with or without a σ of its own. One kernel does all of these, which it is
// told at run time: the branches are uniform, memory is what the passes wait for, and a kernel for each combination
// would take users minutes to compile. Here is how they are read; mixed.cuh has the passes.
#pragma once

#include "elements.cuh"

namespace elbo {

// N neighbours of a dtype known only at run time, no wider than A: as they lie in memory until they are used, so that
// the loads of all tensors are under way at once. Zero until they are read, as is all here that only some branches set:
// what one of them leaves unset would keep its registers through all of the kernel, the prologue and the latents too.
template <class A, int N>
struct Raw {
  uint32_t words[N * sizeof(A) / 4] = {};

  template <class T>
  __device__ void keep(const Few<T, N>& few) {
    memcpy(words, &few, sizeof few);
  }

  __device__ void read(const char* at, int64_t itemsize, Count<N> count) {
    if (itemsize == 1) {
      keep(load(reinterpret_cast<const uint8_t*>(at), count));
    } else if (itemsize == 2) {
      keep(load(reinterpret_cast<const uint16_t*>(at), count));
    } else if (sizeof(A) == 4 || itemsize == 4) {
      keep(load(reinterpret_cast<const uint32_t*>(at), count));
    } else if constexpr (sizeof(A) == 8) {
      keep(load(reinterpret_cast<const uint64_t*>(at), count));
    }
  }

  __device__ Values<A, N> take(ScalarType dtype) const {
    Values<A, N> out = {};
    with_type(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if constexpr (sizeof(T) <= sizeof(A)) {
        Few<T, N> few;
        memcpy(&few, words, sizeof few);
#pragma unroll
        for (int j = 0; j < N; ++j) out.value[j] = static_cast<A>(few.value[j]);
      }
    });
    return out;
  }
};

// Whether one access, or several of 128 bits, can move the n neighbours that lie there.
__device__ inline bool fits(const char* at, int64_t itemsize, int n) {
  return aligned(at, min(n * itemsize, int64_t{16}));
}

// What may be repeated: log σ, a weight. Null where elements have none.
template <class A>
struct Repeated {
  const Broadcast& broadcast;
  const char* at;  // of the chunk where it lies as the data do, else of the sample
  uint32_t first;

  __device__ Repeated(bool exists, const Broadcast& broadcast, int64_t sample, int64_t first)
      : broadcast(broadcast),
        at(exists ? broadcast.values.at(sample, broadcast.rank ? 0 : first) : nullptr),
        first(static_cast<uint32_t>(first)) {}

  __device__ bool fits(int i, int n) const {
    const int64_t itemsize = broadcast.values.itemsize;
    return at == nullptr || broadcast.rank || elbo::fits(at + i * itemsize, itemsize, n);
  }

  template <int N>
  __device__ void read(Raw<A, N>& raw, int i, Count<N> count) const {
    const int64_t itemsize = broadcast.values.itemsize;
    if (at && broadcast.rank == 0) raw.read(at + i * itemsize, itemsize, count);
  }

  // What is repeated is looked up here: it is in a cache, and one division after the other takes longer.
  template <int N>
  __device__ Values<A, N> take(const Raw<A, N>& raw, int i) const {
    if (broadcast.rank == 0) return raw.take(broadcast.values.dtype);
    int64_t offsets[N];
#pragma unroll
    for (int j = 0; j < N; ++j) offsets[j] = offset_of<uint32_t>(broadcast, first + i + j);
    Values<A, N> out = {};
    with_type(broadcast.values.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
#pragma unroll
      for (int j = 0; j < N; ++j) out.value[j] = static_cast<A>(reinterpret_cast<const T*>(at)[offsets[j]]);
    });
    return out;
  }
};

// Own: σ may be an element's own.
template <class A, class R, bool Own>
struct MixedChunk {
  static constexpr int V = 16 / sizeof(A);  // of a half dtype 64 bits, or there would be too few registers
  const Data& data;
  const R* recon;
  const char* target;
  const Repeated<A> log_sigma, weight;

  __device__ MixedChunk(const Data& data, int64_t sample, int64_t first)
      : data(data),
        recon(reinterpret_cast<const R*>(data.recon.at(sample, first))),
        target(data.target.at(sample, first)),
        log_sigma(Own && data.has_log_sigma, data.log_sigma, sample, first),
        weight(data.has_weight, data.weight, sample, first) {}

  // Elements before the first vector; n where there is none.
  __device__ int head(int n) const {
    const int head = head_of(n, recon);
    const int64_t itemsize = data.target.itemsize;
    const bool fit = fits(target + head * itemsize, itemsize, V) && log_sigma.fits(head, V) && weight.fits(head, V);
    return head < n && fit ? head : n;
  }

  template <int N>
  struct Fetched {
    Few<R, N> recon;
    Raw<A, N> target, log_sigma, weight;
  };

  template <int N>
  __device__ Fetched<N> load(int i, Count<N> count) const {
    Fetched<N> f;
    f.recon = elbo::load(recon + i, count);
    f.target.read(target + i * data.target.itemsize, data.target.itemsize, count);
    log_sigma.read(f.log_sigma, i, count);
    weight.read(f.weight, i, count);
    return f;
  }

  template <int N>
  __device__ Values<A, N> target_of(const Fetched<N>& f) const {
    Values<A, N> t = f.target.take(data.target.dtype);
    if (data.target.dtype == ScalarType::Byte) {
      const A step = static_cast<A>(data.target_step), low = static_cast<A>(data.target_low);
#pragma unroll
      for (int j = 0; j < N; ++j) t.value[j] = scaled_byte<A>(t.value[j], step, low);
    }
    return t;
  }

  // x̂; and ∂x̂/∂y, which counts where there is an activation.
  template <int N>
  __device__ Values<A, N> recon_of(const Fetched<N>& f, Values<A, N>& slopes) const {
    Values<A, N> x;
    const auto activate = [&](auto function) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Activated<A> one = function(static_cast<A>(f.recon.value[j]));
        x.value[j] = one.value;
        slopes.value[j] = one.slope;
      }
    };
    if (data.activation == kNoActivation) {
      activate([](A y) { return Activated<A>{y, A(1)}; });
    } else if (data.activation == kSigmoid) {
      activate([](A y) { return sigmoid(y); });
    } else {
      activate([](A y) { return hyperbolic_tangent(y); });
    }
    return x;
  }
};

}  // namespace elbo
