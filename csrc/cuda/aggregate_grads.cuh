// The gradients of the aggregate posterior's log-sums, which are formed anew: of each segment of the other side, and
// then of all.
#pragma once

#include "aggregate_tiles.cuh"

namespace elbo {

// Of z, mu and logvar; without partial sums where it is not wanted.
struct GradSums {
  const void* partials;  // [segments, rows, columns]
  int64_t segments;
  double factor;
  Matrix to;
};

struct GradSumsArguments {
  GradSums each[3];
  int32_t lanes;  // for a sum
};

// Of a z: Σ W ∂/∂μ, W being g p of all latents and h r of each.
template <class A>
struct OfPoints {
  static constexpr int sums = 1;
  static constexpr bool lanes_are_points = true;
  const Points<A> lanes;
  const Components<A> others, densities;  // the last: for the sum over the latents

  explicit __device__ OfPoints(const AggregateArguments& args)
      : lanes{args, static_cast<bool>(args.given.grad_marginals)}, others{args}, densities{args} {}
};

// Of a component: Σ W ∂/∂μ, and Σ W ∂/∂l.
template <class A>
struct OfComponents {
  static constexpr int sums = 2;
  static constexpr bool lanes_are_points = false;
  const Components<A> lanes;
  const Points<A> others, densities;

  explicit __device__ OfComponents(const AggregateArguments& args)
      : lanes{args}, others{args, static_cast<bool>(args.given.grad_marginals)}, densities{args, false} {}
};

// Of a lane and a latent: a record, and the sums.
template <class Side>
constexpr int fields_of = 3 + Side::sums;

constexpr int kChains = 4;  // of sums, so that few wait for one another

// partials: [sums, segments, elements of the lanes' side, latents].
template <class A, class Side>
__device__ void run_aggregate_grads(const AggregateArguments& args) {
  constexpr int n = Shared<A>::n, kFirst = 3;  // the fields behind a record
  constexpr bool lanes_are_points = Side::lanes_are_points;
  __shared__ Shared<A> shared;
  const MixtureOf& mixture = args.mixture;
  const SumsGiven& given = args.given;
  const Side side(args);
  const Place place(args.cut, static_cast<int>(mixture.z.columns));
  const Own<A> own(mixture, lanes_are_points);
  const Fields<A, fields_of<Side>> fields(args, place);
  fields.for_each(place, kWarpSize, [&](int at, int k) {
    const auto record = record_of(side.lanes, place.first_lane + at, k);
    A* const of = fields.at(k, at);
    const auto& [a, b, c] = record;
    field(of, 0) = a;
    field(of, 1) = b;
    field(of, 2) = c;
#pragma unroll
    for (int s = 0; s < Side::sums; ++s) field(of, kFirst + s) = 0;
  });
  __syncthreads();
  A(&factors)[n][kWarpSize] = shared.sums[place.group * place.warps];
  for (int64_t t = 0; t < args.cut.tiles; ++t) {
    const int64_t first = (place.segment * args.cut.tiles + t) * n;
    const bool meets_own = own.meets(place, first, n);
    const auto own_record = [](A* of) {
      return typename std::decay_t<decltype(side.lanes)>::Record{field(of, 0), field(of, 1), field(of, 2)};
    };
    A of_all[n] = {};  // g p
    if (given.grad_joint) {
      for_latents(shared, place, side.densities, first, [&](int k, auto other) {
        const auto record = own_record(fields.at(k, lane()));
#pragma unroll
        for (int x = 0; x < n; ++x) of_all[x] += log_normal_grad(record, other(x)).log_normal;
      });
      over_warps(shared, place, of_all, [&](int x, A total) {
        const int64_t i = lanes_are_points ? place.index : first + x;
        A factor = 0;
        if (i < mixture.z.rows) {
          const A log_sum = less_weight(value<A, A>(given.joint, i * given.joint.span.batch_stride, 0), mixture);
          const A grad = value<A, A>(given.grad_joint, i * given.grad_joint.span.batch_stride, 0);
          factor = grad * exp_of_negative(total + own.of(place, first, x) - log_sum);
        }
        factors[x][lane()] = factor;
      });
      __syncthreads();
#pragma unroll
      for (int x = 0; x < n; ++x) of_all[x] = factors[x][lane()];
    }
    for_latents(shared, place, side.others, first, [&](int k, auto other) {
      A* const of = fields.at(k, lane());
      const auto record = own_record(of);
      A sums[Side::sums][kChains] = {};
#pragma unroll
      for (int x = 0; x < n; ++x) {
        const auto met = other(x);
        const LogNormalGrad<A> d = log_normal_grad(record, met);
        A factor = of_all[x];
        if (given.grad_marginals) {
          const Point<A>& point = point_of(record, met);
          A logs = d.log_normal;
          if (meets_own) logs += own.of(place, first, x);
          factor += point.grad * exp_of_negative(logs - point.log_sum);
        }
        sums[0][x % kChains] += factor * d.half_mu;
        if constexpr (Side::sums == 2) sums[1][x % kChains] += factor * d.logvar;
      }
#pragma unroll
      for (int s = 0; s < Side::sums; ++s) field(of, kFirst + s) += sum_of(sums[s]);
    });
    __syncthreads();  // or the next tile's sums would be written over the factors
  }
  if (place.segment >= args.cut.segments) return;
  fields.for_each(place, place.lanes_of(side.lanes.count()), [&](int at, int k) {
#pragma unroll
    for (int s = 0; s < Side::sums; ++s) {
      const int64_t part = s * args.cut.segments + place.segment;
      const int64_t to = (part * side.lanes.count() + place.first_lane + at) * fields.latents + k;
      static_cast<A*>(args.partials)[to] = field(fields.at(k, at), kFirst + s);
    }
  });
}

template <class A>
__device__ void run_grad_sums(const GradSumsArguments& args) {
#pragma unroll
  for (int which = 0; which < 3; ++which) {
    const GradSums& one = args.each[which];
    if (one.partials == nullptr) continue;
    const int columns = static_cast<int>(one.to.columns);
    const auto sum = [&](int64_t at, int own) {
      A all = 0;
      for (int64_t s = own; s < one.segments; s += args.lanes) {
        all += static_cast<const A*>(one.partials)[s * one.to.rows * columns + at];
      }
      return warp_sum(all, args.lanes);
    };
    for_sums(one.to.rows, columns, args.lanes, sum, [&](int64_t row, int column, A found) {
      put(one.to, row, column, static_cast<A>(one.factor) * found);
    });
  }
}

template <class A, class Side>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, 2>) aggregate_grads_kernel(AggregateArguments args) {
  run_aggregate_grads<A, Side>(args);
}

template <class A>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, 4>) aggregate_grad_sums_kernel(GradSumsArguments args) {
  run_grad_sums<A>(args);
}

}  // namespace elbo
