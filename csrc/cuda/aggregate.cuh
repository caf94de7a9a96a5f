// The log-sums of the aggregate posterior: of each segment of the components, and then of all.
#pragma once

#include "aggregate_tiles.cuh"

namespace elbo {

struct LogSumsArguments {
  int64_t batch, latents, segments;
  int32_t lanes;  // for a sum
  double log_others;
  const void* partials;
  Matrix joint, marginals;
};

// Σ 2^x of what was added, as 2^most · sum. NaN is no maximum, but it is in the sum.
template <class A>
struct LogSum {
  A most, sum;

  static __device__ LogSum none() {
    return {-kInfinity<A>, A(0)};
  }

  // Begins a step to a maximum that may be greater. Returns what is to be taken from each x.
  __device__ A rise(A next) {
    next = max(most, next);
    const A shift = next == -kInfinity<A> ? A(0) : next;
    sum *= power_of_two(most - shift);
    most = next;
    return shift;
  }

  __device__ void add(const LogSum& other) {
    const A shift = rise(other.most);
    sum += other.sum * power_of_two(other.most - shift);
  }

  __device__ double log(double log_weight) const {
    return kLn2 * (static_cast<double>(most) + ::log2(static_cast<double>(sum))) + log_weight;
  }
};

constexpr int kLogSumFields = 3;  // of a lane and a latent

// partials: [segments, batch, latents + 1] of LogSum, the joint one last.
template <class A>
__device__ void run_aggregate(const AggregateArguments& args) {
  constexpr int n = Shared<A>::n;
  enum { kZ, kMost, kSum };
  __shared__ Shared<A> shared;
  const MixtureOf& mixture = args.mixture;
  const int64_t batch = mixture.z.rows, latents = mixture.z.columns;
  const Components<A> components{args};
  const Place place(args.cut, latents);
  const Own<A> own(mixture, true);
  const Fields<A> fields(args, place, kLogSumFields);
  const ScalarType dtype = mixture.z.span.dtype;
  fields.for_each(place, kWarpSize, [&](int at, int64_t k) {
    A z = 0;
    if (place.first_lane + at < batch) {
      with_floating(dtype, [&](auto* type) {
        z = value<std::remove_pointer_t<decltype(type)>, A>(mixture.z, place.first_lane + at, k);
      });
    }
    const auto none = LogSum<A>::none();
    fields.put(k, at, Point<A>{z, none.most, none.sum});
  });
  __syncthreads();
  auto joint = LogSum<A>::none();
  A(&totals)[n][kWarpSize] = shared.sums[place.group * place.warps];  // of the group's warps, where they are added up
  for (int64_t t = 0; t < args.cut.tiles; ++t) {
    const int64_t first = (place.segment * args.cut.tiles + t) * n;
    const bool meets_own = own.meets(place, first, n);
    A all[n];
#pragma unroll
    for (int x = 0; x < n; ++x) all[x] = first < components.count() ? A(0) : -kInfinity<A>;
    for_latents(shared, place, components, first, dtype, [&](int64_t k, auto component) {
      const A z = fields.at(kZ, k, lane());
      LogSum<A> of_one = {fields.at(kMost, k, lane()), fields.at(kSum, k, lane())};
      A bits[n], maxima[n];
#pragma unroll
      for (int x = 0; x < n; ++x) all[x] += bits[x] = log_normal_grad(z, component(x)).log_normal;
      if (meets_own) {
#pragma unroll
        for (int x = 0; x < n; ++x) bits[x] += own.of(place, first, x);
      }
#pragma unroll
      for (int x = 0; x < n; ++x) maxima[x] = bits[x];
      const A shift = of_one.rise(reduced(maxima, [](A a, A b) { return max(a, b); }));
#pragma unroll
      for (int x = 0; x < n; ++x) bits[x] = power_of_two(bits[x] - shift);
      fields.at(kMost, k, lane()) = of_one.most;
      fields.at(kSum, k, lane()) = of_one.sum + sum_of(bits);
    });
    A most = -kInfinity<A>;
    over_warps(shared, place, all, [&](int x, A total) {
      totals[x][lane()] = total + own.of(place, first, x);
      most = max(most, totals[x][lane()]);
    });
    const A shift = joint.rise(most);
    for (int x = place.member; x < n; x += place.warps) joint.sum += power_of_two(totals[x][lane()] - shift);
    __syncthreads();  // or the next tile's sums would be written over these
  }
  // Of the group's warps.
  shared.sums[warp()][0][lane()] = joint.most;
  shared.sums[warp()][1][lane()] = joint.sum;
  __syncthreads();
  if (place.segment >= args.cut.segments) return;
  LogSum<A>* partials = static_cast<LogSum<A>*>(args.partials) + place.segment * batch * (latents + 1);
  if (place.member == 0 && place.index < batch) {
    for (int w = 1; w < place.warps; ++w) {
      const auto& of_warp = shared.sums[warp() + w];
      joint.add({of_warp[0][lane()], of_warp[1][lane()]});
    }
    partials[place.index * (latents + 1) + latents] = joint;
  }
  fields.for_each(place, place.lanes_of(batch), [&](int at, int64_t k) {
    partials[(place.first_lane + at) * (latents + 1) + k] = {fields.at(kMost, k, at), fields.at(kSum, k, at)};
  });
}

template <class A>
__device__ void run_log_sums(const LogSumsArguments& args) {
  const int64_t columns = args.latents + 1, count = args.batch * columns;
  for_sums(count, args.lanes, [&](int64_t at, int own) {
    auto sum = LogSum<A>::none();
    for (int64_t s = own; s < args.segments; s += args.lanes) {
      sum.add(static_cast<const LogSum<A>*>(args.partials)[s * count + at]);
    }
    for (int step = args.lanes / 2; step > 0; step /= 2) {
      sum.add({__shfl_xor_sync(0xffffffffu, sum.most, step), __shfl_xor_sync(0xffffffffu, sum.sum, step)});
    }
    return sum;
  }, [&](int64_t at, const LogSum<A>& sum) {
    const int64_t i = at / columns, k = at % columns;
    const bool is_joint = k == args.latents;
    put(is_joint ? args.joint : args.marginals, i, is_joint ? 0 : k, static_cast<A>(sum.log(args.log_others)));
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, 2>) aggregate_kernel(AggregateArguments args) {
  run_aggregate<A>(args);
}

template <class A>
__global__ void __launch_bounds__(kThreads) aggregate_sums_kernel(LogSumsArguments args) {
  run_log_sums<A>(args);
}

}  // namespace elbo
