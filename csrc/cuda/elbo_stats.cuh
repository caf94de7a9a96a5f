// Stage one: A_i = Σ_d |e|^q (or Σ_d [|e|^q/σ_d^q + q log σ_d]) and KL_i, as one partial sum for each chunk of a
// sample; and of the weights, where elements have any.
#pragma once

#include "mixed.cuh"

namespace elbo {

struct StatsArguments {
  ChunkedBatch batch;
  Partials partials;
};

template <class A, class R, class T, bool Element>
__device__ A squared_error(const Data& data, const Chunk& p) {
  using Elements = DataChunk<A, R, T, Element>;
  const Elements elements(data, p.sample, p.first);
  A sum = 0;
  walk<Elements::Turns, Elements::V>(
      p.n, elements.head(p.n), [&](int i, auto count) { return elements.load(i, count); },
      [&](int, const auto& fetched, auto count) {
        A part = 0;
#pragma unroll
        for (int j = 0; j < count.n; ++j) {
          const A e = fetched.error(j);
          if constexpr (Element) {
            part += scaled_error<2>(e, fetched.log_sigma.value[j]);
          } else {
            part += power<2>(e);
          }
        }
        sum += part;
      });
  return warp_sum(sum);
}

template <class A>
__device__ void rates(const Latents& latents, const Chunk& p, A& rate, A& clamped) {
  const LatentChunk<A> elements(latents, p);
  const A free_bits = static_cast<A>(latents.free_bits);
  A sum = 0, sum_clamped = 0;
  elements.walk(
      p.n, elements.vector(),
      [&](auto& held, int i, auto count) {
        const auto values = elements.take(held, i, count);
#pragma unroll
        for (int j = 0; j < count.n; ++j) {
          const A nats = elements.nats(values, j);
          sum += nats;
          sum_clamped += nats < free_bits ? free_bits : nats;  // NaN passes
        }
      },
      [](const auto&, int) {});
  rate = warp_sum(sum);
  clamped = warp_sum(sum_clamped);
}

template <class A, class R, class T, bool Element>
__device__ void write_errors(const Data& data, const Partials& out, const Chunk& chunk) {
  if constexpr (kIsMixed<T>) {
    const MixedChunk<A, R, Element> elements(data, chunk.sample, chunk.first);
    write_sums(mixed_sums(elements, chunk.n, elements.head(chunk.n), A(0), [](int, const auto&, auto) {}), out, chunk);
  } else {
    const A a = squared_error<A, R, T, Element>(data, chunk);
    if (lane() == 0) static_cast<A*>(out.a)[chunk.index] = a;
  }
}

template <class A>
__device__ void write_rates(const Batch& batch, const Partials& out, const Chunk& chunk) {
  A rate, clamped;
  rates<A>(batch.latents, chunk, rate, clamped);
  if (lane() != 0) return;
  static_cast<A*>(out.kl)[chunk.index] = rate;
  if (out.clamped != out.kl) static_cast<A*>(out.clamped)[chunk.index] = clamped;
}

template <class A, class R, class T, bool Element>
__device__ void run_stats(const StatsArguments& args) {
  for_chunks(args.batch, true, true, warp_of_blocks(0), warps_of_blocks(gridDim.x), [&](const Chunk& chunk) {
    if (chunk.is_data) {
      write_errors<A, R, T, Element>(args.batch.data, args.partials, chunk);
    } else {
      write_rates<A>(args.batch, args.partials, chunk);
    }
  });
}

template <class A, class R, class T, bool Element>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, kIsMixed<T> ? 2 : 3>)
    elbo_stats_kernel(StatsArguments args) {
  run_stats<A, R, T, Element>(args);
}

}  // namespace elbo
