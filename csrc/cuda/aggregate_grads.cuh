// The gradients of the aggregate posterior's log-sums, which are formed anew: of each segment of the other side, and then
// of all.
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
  using Lanes = Points<A>;
  using Others = Components<A>;
};

// Of a component: Σ W ∂/∂μ, and Σ W ∂/∂l.
template <class A>
struct OfComponents {
  static constexpr int sums = 2;
  static constexpr bool lanes_are_points = false;
  using Lanes = Components<A>;
  using Others = Points<A>;
};

// Of a lane and a latent: a record, and the sums.
template <class Side>
constexpr int fields_of = 3 + Side::sums;

// partials: [sums, segments, elements of the lanes' side, latents].
template <class A, class Side>
__device__ void run_aggregate_grads(const AggregateArguments& args) {
  constexpr int n = Shared<A>::n, kFirst = 3;  // the fields behind a record
  constexpr bool lanes_are_points = Side::lanes_are_points;
  __shared__ Shared<A> shared;
  const MixtureOf& mixture = args.mixture;
  const SumsGiven& given = args.given;
  const typename Side::Lanes lanes{args};
  const typename Side::Others others{args};
  const Points<A> points{args};
  const Place place(args.cut, mixture.z.columns);
  const Own<A> own(mixture, lanes_are_points);
  const Fields<A> fields(args, place, fields_of<Side>);
  const ScalarType dtype = mixture.z.span.dtype;
  fields.for_each(place, kWarpSize, [&](int at, int64_t k) {
    auto record = Side::Lanes::none();
    if (place.first_lane + at < lanes.count()) {
      with_floating(dtype, [&](auto* type) {
        record = lanes.template read<std::remove_pointer_t<decltype(type)>>(place.first_lane + at, k);
      });
    }
    fields.put(k, at, record);
#pragma unroll
    for (int s = 0; s < Side::sums; ++s) fields.at(kFirst + s, k, at) = 0;
  });
  __syncthreads();
  A(&factors)[n][kWarpSize] = shared.sums[place.group * place.warps];
  for (int64_t t = 0; t < args.cut.tiles; ++t) {
    const int64_t first = (place.segment * args.cut.tiles + t) * n;
    const bool meets_own = own.meets(place, first, n);
    const auto own_record = [&](int64_t k) {
      return typename Side::Lanes::Record{fields.at(0, k, lane()), fields.at(1, k, lane()), fields.at(2, k, lane())};
    };
    A of_all[n] = {};  // g p
    if (given.grad_joint) {
      for_latents(shared, place, others, first, dtype, [&](int64_t k, auto other) {
        const auto record = own_record(k);
#pragma unroll
        for (int x = 0; x < n; ++x) of_all[x] += of_pair(record, other(x)).log_normal;
      });
      over_warps(shared, place, of_all, [&](int x, A total) {
        const int64_t i = lanes_are_points ? place.index : first + x;
        A factor = 0;
        if (i < points.count()) {
          const A bits = total + own.of(place, first, x) - points.log_sum(given.joint, i, 0);
          factor = value<A, A>(given.grad_joint, i, 0) * power_of_two(bits);
        }
        factors[x][lane()] = factor;
      });
      __syncthreads();
#pragma unroll
      for (int x = 0; x < n; ++x) of_all[x] = factors[x][lane()];
    }
    for_latents(shared, place, others, first, dtype, [&](int64_t k, auto other) {
      const auto record = own_record(k);
      A sums[Side::sums][n];
#pragma unroll
      for (int x = 0; x < n; ++x) {
        const auto met = other(x);
        const BitsGrad<A> d = of_pair(record, met);
        A factor = of_all[x];
        if (given.grad_marginals) {
          const auto& point = [&]() -> const auto& {
            if constexpr (lanes_are_points) {
              return record;
            } else {
              return met;
            }
          }();
          A bits = d.log_normal;
          if (meets_own) bits += own.of(place, first, x);
          factor += point.grad * power_of_two(bits - point.log_sum);
        }
        sums[0][x] = factor * d.mu;
        if constexpr (Side::sums == 2) sums[1][x] = factor * d.logvar;
      }
#pragma unroll
      for (int s = 0; s < Side::sums; ++s) fields.at(kFirst + s, k, lane()) += sum_of(sums[s]);
    });
    __syncthreads();  // or the next tile's sums would be written over the factors
  }
  if (place.segment >= args.cut.segments) return;
  fields.for_each(place, place.lanes_of(lanes.count()), [&](int at, int64_t k) {
#pragma unroll
    for (int s = 0; s < Side::sums; ++s) {
      const int64_t part = s * args.cut.segments + place.segment;
      const int64_t to = (part * lanes.count() + place.first_lane + at) * fields.latents + k;
      static_cast<A*>(args.partials)[to] = fields.at(kFirst + s, k, at);
    }
  });
}

template <class A>
__device__ void run_grad_sums(const GradSumsArguments& args) {
#pragma unroll 1
  for (const GradSums& one : args.each) {
    if (one.partials == nullptr) continue;
    const int64_t count = one.to.rows * one.to.columns;
    for_sums(count, args.lanes, [&](int64_t at, int own) {
      A sum = 0;
      for (int64_t s = own; s < one.segments; s += args.lanes) {
        sum += static_cast<const A*>(one.partials)[s * count + at];
      }
      return warp_sum(sum, args.lanes);
    }, [&](int64_t at, A sum) { put(one.to, at / one.to.columns, at % one.to.columns, static_cast<A>(one.factor) * sum); });
  }
}

template <class A, class Side>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<A, 2>) aggregate_grads_kernel(AggregateArguments args) {
  run_aggregate_grads<A, Side>(args);
}

template <class A>
__global__ void __launch_bounds__(kThreads) aggregate_grad_sums_kernel(GradSumsArguments args) {
  run_grad_sums<A>(args);
}

}  // namespace elbo
