// What the kernels of the aggregate posterior share.
//
// A lane has a z, and runs over the components, a tile of them at a time; or it has a component, for the gradients of
// those, and runs over the z. The numbers of the other side are the same for all lanes of a warp, which takes one latent
// after the other: so a sum over the latents is one over the turns of a loop, and, once a tile, over the warps that share
// them. All is in bits, where exp is 2^x, until the end.
#pragma once

#include <limits>

#include "aggregate.h"
#include "device.cuh"

namespace elbo {

struct AggregateArguments {
  MixtureOf mixture;
  SumsGiven given;  // for the gradients
  AggregateCut cut;
  void* fields;    // what a lane has of each latent, where it does not fit on chip
  void* partials;  // of each segment
};

extern __shared__ float on_chip[];  // fields

constexpr int kPitch = kWarpSize + 1;  // between latents, so that neither rows nor columns meet in a bank
constexpr int kStaged = 4;             // latents that a warp reads at a time, of each element of a tile

// 2^x. In fp32 by one instruction, which has a relative error of 2^-22, and 0 for what is below 2^-126.
__device__ inline float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::exp2f(x);
#endif
}

__device__ inline double power_of_two(double x) {
  return ::exp2(x);
}

// --------------------------------------------------------------------------------------- what is known of an element

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class T, class A>
__device__ inline A value(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<A>(*reinterpret_cast<const T*>(m.span.at(row, column * m.stride)));
}

// In pairs, so that few wait for one another.
template <int N, class A, class F>
__device__ inline A reduced(A (&x)[N], F f) {
#pragma unroll
  for (int step = N / 2; step > 0; step /= 2) {
#pragma unroll
    for (int k = 0; k < step; ++k) x[k] = f(x[k], x[k + step]);
  }
  return x[0];
}

template <int N, class A>
__device__ inline A sum_of(A (&x)[N]) {
  return reduced(x, [](A a, A b) { return a + b; });
}

// One latent of a z: its gradient and its log-sum in bits, less the weight that most components have.
template <class A>
struct Point {
  A z, grad, log_sum;
};

template <class A>
struct Points {
  using Record = Point<A>;
  const AggregateArguments& args;

  __device__ int64_t count() const {
    return args.mixture.z.rows;
  }

  __device__ A log_sum(const Matrix& of, int64_t i, int64_t k) const {
    return static_cast<A>(kLog2E * (value<A, double>(of, i, k) - args.mixture.log_weights.others));
  }

  template <class T>
  __device__ Record read(int64_t i, int64_t k) const {
    const A z = value<T, A>(args.mixture.z, i, k);
    if (!args.given.grad_marginals) return {z, A(0), A(0)};
    return {z, value<A, A>(args.given.grad_marginals, i, k), log_sum(args.given.marginals, i, k)};
  }

  // Of no weight with any component.
  static __device__ Record none() {
    return {A(0), A(0), kInfinity<A>};
  }
};

template <class A>
struct Components {
  using Record = BitsComponent<A>;
  const AggregateArguments& args;

  __device__ int64_t count() const {
    return args.mixture.mu.rows;
  }

  template <class T>
  __device__ Record read(int64_t j, int64_t k) const {
    return component_in_bits(value<T, A>(args.mixture.mu, j, k), value<T, A>(args.mixture.logvar, j, k));
  }

  // Of density 0, for an infinite z too.
  static __device__ Record none() {
    return {A(0), A(-1), -kInfinity<A>};
  }
};

template <class A>
__device__ inline BitsGrad<A> of_pair(const Point<A>& p, const BitsComponent<A>& c) {
  return log_normal_grad(p.z, c);
}

template <class A>
__device__ inline BitsGrad<A> of_pair(const BitsComponent<A>& c, const Point<A>& p) {
  return log_normal_grad(p.z, c);
}

// ------------------------------------------------------------------------------------------------ where a thread is

struct Place {
  int warps, member, group;   // of this warp's group, its number there, and the group's in the block
  int64_t first_lane, index;  // the block's first element, and this lane's
  int64_t segment;
  int64_t begin, end;  // this warp's latents

  __device__ Place(const AggregateCut& cut, int64_t latents)
      : warps(cut.warps),
        member(warp() % cut.warps),
        group(warp() / cut.warps),
        first_lane(blockIdx.x % cut.lane_blocks * kWarpSize),
        index(first_lane + lane()),
        segment(blockIdx.x / cut.lane_blocks * cut.groups + group),
        begin(min(divided_up(latents, warps) * member, latents)),
        end(min(divided_up(latents, warps) * (member + 1), latents)) {}

  // How many of the block's lanes have one of `count` elements.
  __device__ int lanes_of(int64_t count) const {
    return static_cast<int>(min(count - first_lane, static_cast<int64_t>(kWarpSize)));
  }
};

// Which element of a tile belongs to a lane's own one: drawn from it, or that it was drawn from.
template <class A>
struct Own {
  A excess;       // of its log-weight
  int64_t shift;  // from the lane's index to the other's

  __device__ Own(const MixtureOf& mixture, bool lanes_are_points)
      : excess(mixture.own < 0 ? A(0) : A(kLog2E * (mixture.log_weights.own - mixture.log_weights.others))),
        shift(lanes_are_points ? mixture.own : -mixture.own) {}

  __device__ bool meets(const Place& place, int64_t first, int64_t n) const {
    const int64_t from = place.first_lane + shift - first;
    return excess != A(0) && from < n && from + kWarpSize > 0;
  }

  // To be added to the log-weight of element x of a tile.
  __device__ A of(const Place& place, int64_t first, int x) const {
    return place.index + shift == first + x ? excess : A(0);
  }
};

// Numbers that the group's lanes have of each latent.
template <class A>
struct Fields {
  A* base;
  int64_t latents;

  __device__ Fields(const AggregateArguments& args, const Place& place, int count)
      : base(reinterpret_cast<A*>(on_chip)), latents(args.mixture.z.columns) {
    const int64_t of_group = count * latents * kPitch;
    if (args.fields) base = static_cast<A*>(args.fields) + blockIdx.x * args.cut.groups * of_group;
    base += place.group * of_group;
  }

  __device__ A& at(int field, int64_t k, int lane) const {
    return base[(field * latents + k) * kPitch + lane];
  }

  template <class Record>
  __device__ void put(int64_t k, int lane, const Record& record) const {
    const auto& [a, b, c] = record;
    at(0, k, lane) = a;
    at(1, k, lane) = b;
    at(2, k, lane) = c;
  }

  // Calls f(lane, latent) for this thread's share of those of some lanes. Neighbours have neighbouring latents.
  template <class F>
  __device__ void for_each(const Place& place, int lanes, F f) const {
    const unsigned each = static_cast<unsigned>(latents), all = each * lanes, threads = place.warps * kWarpSize;
    for (unsigned e = place.member * kWarpSize + lane(); e < all; e += threads) {
      f(static_cast<int>(e / each), static_cast<int64_t>(e % each));
    }
  }
};

template <class A>
struct Shared {
  static constexpr int n = kAggregateTile<A>;
  static constexpr int pitch = n + 8;  // latents side by side are written at once: to different banks
  alignas(16) A sums[kAggregateWarps][n][kWarpSize];
  alignas(16) A staged[kAggregateWarps][3][kStaged][pitch];
};

// ------------------------------------------------------------------------------------------------------- tiles

// Reads some latents of a tile's elements, for this warp.
template <class T, class A, class Side>
__device__ inline void stage(Shared<A>& shared, const Side& side, int64_t first, int64_t k, int64_t end) {
  constexpr int each = Shared<A>::n * kStaged / kWarpSize;
  A(&to)[3][kStaged][Shared<A>::pitch] = shared.staged[warp()];
#pragma unroll
  for (int turn = 0; turn < each; ++turn) {
    const int of = turn * kWarpSize + lane(), x = of / kStaged, ahead = of % kStaged;
    if (k + ahead >= end) continue;
    const auto record = first + x < side.count() ? side.template read<T>(first + x, k + ahead) : Side::none();
    const auto& [a, b, c] = record;
    to[0][ahead][x] = a;
    to[1][ahead][x] = b;
    to[2][ahead][x] = c;
  }
}

// Calls f(k, record of x) for this warp's latents of a tile, unless it lies behind the last element.
template <class A, class Side, class F>
__device__ inline void for_latents(
    Shared<A>& shared, const Place& place, const Side& side, int64_t first, ScalarType dtype, F f) {
  if (first >= side.count()) return;
  for (int64_t k = place.begin; k < place.end; k += kStaged) {
    with_floating(dtype, [&](auto* type) {
      stage<std::remove_pointer_t<decltype(type)>>(shared, side, first, k, place.end);
    });
    __syncwarp();
    const int count = static_cast<int>(min(place.end - k, static_cast<int64_t>(kStaged)));
#pragma unroll 1
    for (int ahead = 0; ahead < count; ++ahead) {
      const auto& from = shared.staged[warp()];
      f(k + ahead, [&](int x) { return typename Side::Record{from[0][ahead][x], from[1][ahead][x], from[2][ahead][x]}; });
    }
    __syncwarp();  // or the next ones would be written over these
  }
}

// Adds up over the group's warps what each has for the elements of a tile, and calls f(x, total) for this warp's.
template <class A, class F>
__device__ inline void over_warps(Shared<A>& shared, const Place& place, const A (&all)[Shared<A>::n], F f) {
#pragma unroll
  for (int x = 0; x < Shared<A>::n; ++x) shared.sums[warp()][x][lane()] = all[x];
  __syncthreads();
  const int first = place.group * place.warps;
  for (int x = place.member; x < Shared<A>::n; x += place.warps) {
    A total = 0;
    for (int w = 0; w < place.warps; ++w) total += shared.sums[first + w][x][lane()];
    f(x, total);
  }
}

// --------------------------------------------------------------------------------------------- sums over the segments

// Calls put(at, sum(at, own)) for `count` sums, each of some neighbouring lanes, of which `own` is this one's number. All
// lanes of a warp are in `sum` at once.
template <class Sum, class Put>
__device__ inline void for_sums(int64_t count, int lanes, Sum sum, Put put) {
  const int64_t each = kWarpSize / lanes;
  for (int64_t w = warp_of_blocks(0); w * each < count; w += warps_of_blocks(gridDim.x)) {
    const int64_t at = w * each + lane() / lanes;
    const auto found = sum(min(at, count - 1), lane() % lanes);
    if (at < count && lane() % lanes == 0) put(at, found);
  }
}

template <class A>
__device__ inline void put(const Matrix& m, int64_t row, int64_t column, A value) {
  with_floating(m.span.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    *reinterpret_cast<T*>(m.span.at(row, column * m.stride)) = static_cast<T>(value);
  });
}

}  // namespace elbo
