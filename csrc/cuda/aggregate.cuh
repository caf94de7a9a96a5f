// The log-sums of the aggregate posterior: of each segment of the components, and then of all.
#pragma once

#include "aggregate_tiles.cuh"

namespace elbo {

struct LogSumsArguments {
  int64_t segments;
  int32_t lanes;  // for a sum
  double log_others;
  const void* partials;
  Matrix joint, marginals;
};

// Σ exp of what was added, as exp(most) · sum. NaN is no maximum, but it is in the sum.
template <class A>
struct alignas(2 * sizeof(A)) LogSum {
  A most, sum;

  static __device__ LogSum none() {
    return {-kInfinity<A>, A(0)};
  }

  // Begins a step to a maximum that may be greater. Returns what is to be taken from each x.
  __device__ A rise(A next) {
    next = max(most, next);
    const A shift = next == -kInfinity<A> ? A(0) : next;
    sum *= exp_of_negative(most - shift);
    most = next;
    return shift;
  }

  __device__ void add(const LogSum& other) {
    const A shift = rise(other.most);
    sum += other.sum * exp_of_negative(other.most - shift);
  }

  __device__ double log(double log_weight) const {
    return static_cast<double>(most) + ::log(static_cast<double>(sum)) + log_weight;
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
  const int64_t batch = mixture.z.rows;
  const int latents = static_cast<int>(mixture.z.columns);
  const Components<A> components{args};
  const Place place(args.cut, latents);
  const Own<A> own(mixture, true);
  const Fields<A, kLogSumFields> fields(args, place);
  fields.for_each(place, kWarpSize, [&](int at, int k) {
    A* const of = fields.at(k, at);
    const auto none = LogSum<A>::none();
    field(of, kZ) = record_of(Points<A>{args, false}, place.first_lane + at, k).z;
    field(of, kMost) = none.most;
    field(of, kSum) = none.sum;
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
    for_latents(shared, place, components, first, [&](int k, auto component) {
      A* const of = fields.at(k, lane());
      const A z = field(of, kZ);
      LogSum<A> of_one = {field(of, kMost), field(of, kSum)};
      A logs[n], maxima[n];
#pragma unroll
      for (int x = 0; x < n; ++x) all[x] += logs[x] = log_normal(z, component(x));
      if (meets_own) {
#pragma unroll
        for (int x = 0; x < n; ++x) logs[x] += own.of(place, first, x);
      }
#pragma unroll
      for (int x = 0; x < n; ++x) maxima[x] = logs[x];
      const A shift = of_one.rise(most_of(maxima));
#pragma unroll
      for (int x = 0; x < n; ++x) logs[x] = exp_of_negative(logs[x] - shift);
      field(of, kMost) = of_one.most;
      field(of, kSum) = of_one.sum + sum_of(logs);
    });
    A most = -kInfinity<A>;
    over_warps(shared, place, all, [&](int x, A total) {
      totals[x][lane()] = total + own.of(place, first, x);
      most = max(most, totals[x][lane()]);
    });
    const A shift = joint.rise(most);
    for (int x = place.member; x < n; x += place.warps) joint.sum += exp_of_negative(totals[x][lane()] - shift);
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
  fields.for_each(place, place.lanes_of(batch), [&](int at, int k) {
    A* const of = fields.at(k, at);
    partials[(place.first_lane + at) * (latents + 1) + k] = {field(of, kMost), field(of, kSum)};
  });
}

template <class A>
__device__ void run_log_sums(const LogSumsArguments& args) {
  const int latents = static_cast<int>(args.marginals.columns);
  const int64_t batch = args.marginals.rows, count = batch * (latents + 1);
  const auto sum = [&](int64_t at, int own) {
    auto all = LogSum<A>::none();
    for (int64_t s = own; s < args.segments; s += args.lanes) {
      all.add(static_cast<const LogSum<A>*>(args.partials)[s * count + at]);
    }
    for (int step = args.lanes / 2; step > 0; step /= 2) {
      all.add({__shfl_xor_sync(0xffffffffu, all.most, step), __shfl_xor_sync(0xffffffffu, all.sum, step)});
    }
    return all;
  };
  for_sums(batch, latents + 1, args.lanes, sum, [&](int64_t i, int k, const LogSum<A>& found) {
    const A log = static_cast<A>(found.log(args.log_others));
    k < latents ? put(args.marginals, i, k, log) : put(args.joint, i, 0, log);
  });
}

template <class A>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, 2>) aggregate_kernel(AggregateArguments args) {
  run_aggregate<A>(args);
}

template <class A>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, 4>) aggregate_sums_kernel(LogSumsArguments args) {
  run_log_sums<A>(args);
}

}  // namespace elbo
