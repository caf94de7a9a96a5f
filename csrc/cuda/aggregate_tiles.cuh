// How the kernels of the aggregate posterior walk over it.
//
// A lane has a z, and runs over the components, a tile of them at a time; or it has a component, for the gradients of
// those, and runs over the z. The numbers of the other side are the same for all lanes of a warp, which takes one
// latent after the other: so a sum over the latents is one over the turns of a loop, and, once a tile, over the warps
// that share them.
#pragma once

#include "aggregate_sides.cuh"

namespace elbo {

extern __shared__ float on_chip[];  // fields

constexpr int kPitch = kWarpSize + 1;  // between latents, so that neither rows nor columns meet in a bank
constexpr int kStaged = 4;             // latents that a warp reads at a time, of each element of a tile

// ------------------------------------------------------------------------------------------------ where a thread is

struct Place {
  int warps, member, group;   // of this warp's group, its number there, and the group's in the block
  int64_t first_lane, index;  // the block's first element, and this lane's
  int64_t segment;
  int begin, end;  // this warp's latents

  __device__ Place(const AggregateCut& cut, int latents)
      : warps(cut.warps),
        member(warp() % cut.warps),
        group(warp() / cut.warps),
        first_lane(blockIdx.x % cut.lane_blocks * kWarpSize),
        index(first_lane + lane()),
        segment(blockIdx.x / cut.lane_blocks * cut.groups + group),
        begin(min(cut.latents * member, latents)),
        end(min(cut.latents * (member + 1), latents)) {}

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
      : excess(mixture.own < 0 ? A(0) : static_cast<A>(mixture.log_weights.own - mixture.log_weights.others)),
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

// Numbers that the group's lanes have of each latent, side by side.
template <class A, int Count>
struct Fields {
  A* base;
  int latents;

  __device__ Fields(const AggregateArguments& args, const Place& place)
      : base(reinterpret_cast<A*>(on_chip)), latents(static_cast<int>(args.mixture.z.columns)) {
    const int64_t of_group = static_cast<int64_t>(Count) * kPitch * latents;
    if (args.fields) base = static_cast<A*>(args.fields) + blockIdx.x * args.cut.groups * of_group;
    base += place.group * of_group;
  }

  __device__ A* at(int k, int lane) const {
    return base + static_cast<int64_t>(k) * (Count * kPitch) + lane;
  }

  // Calls f(lane, latent) for this thread's share of those of some lanes. Neighbours have neighbouring latents.
  template <class F>
  __device__ void for_each(const Place& place, int lanes, F f) const {
    const unsigned all = latents * lanes, threads = place.warps * kWarpSize;
    for (unsigned e = place.member * kWarpSize + lane(); e < all; e += threads) {
      f(static_cast<int>(e / latents), static_cast<int>(e % latents));
    }
  }
};

// One of them, of a lane and a latent.
template <class A>
__device__ inline A& field(A* of, int which) {
  return of[which * kPitch];
}

template <class A>
struct Shared {
  static constexpr int n = kAggregateTile<A>;
  static constexpr int pitch = n + 8;  // latents side by side are written at once: to different banks
  alignas(16) A sums[kAggregateWarps][n][kWarpSize];
  alignas(16) A staged[kAggregateWarps][3][kStaged][pitch];
};

// ------------------------------------------------------------------------------------------------------- tiles

// Calls f(k, record of x) for this warp's latents of a tile, unless it lies behind the last element. While some latents
// have their turns, the next ones are on their way.
template <class A, class Side, class F>
__device__ inline void for_latents(Shared<A>& shared, const Place& place, const Side& side, int64_t first, F f) {
  if (first >= side.count() || place.begin == place.end) return;
  constexpr int apart = kWarpSize / kStaged, each = Shared<A>::n / apart;
  const int own = lane() / kStaged, ahead = lane() % kStaged;
  typename Side::Row rows[each];
  typename Side::Read read[each];
#pragma unroll
  for (int turn = 0; turn < each; ++turn) rows[turn] = side.row(min(first + own + turn * apart, side.count() - 1));
  const auto fetch = [&](int k) {
    with_floating(side.args.mixture.z.span.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
#pragma unroll
      for (int turn = 0; turn < each; ++turn) {
        read[turn] = side.template read<T>(rows[turn], min(k + ahead, place.end - 1));
      }
    });
  };
  A(&staged)[3][kStaged][Shared<A>::pitch] = shared.staged[warp()];
  fetch(place.begin);
  for (int k = place.begin; k < place.end; k += kStaged) {
#pragma unroll
    for (int turn = 0; turn < each; ++turn) {
      const int x = own + turn * apart;
      const auto record = first + x < side.count() ? side.record(read[turn]) : Side::none();
      const auto& [a, b, c] = record;
      staged[0][ahead][x] = a;
      staged[1][ahead][x] = b;
      staged[2][ahead][x] = c;
    }
    __syncwarp();
    if (k + kStaged < place.end) fetch(k + kStaged);
    const int count = min(place.end - k, kStaged);
#pragma unroll 1
    for (int of = 0; of < count; ++of) {
      f(k + of, [&](int x) { return typename Side::Record{staged[0][of][x], staged[1][of][x], staged[2][of][x]}; });
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

// Calls put(row, column, sum(at, own)) for a matrix of sums, element `at` of which is of some neighbouring lanes; `own`
// is this one's number. A warp has a row, and all of its lanes are in `sum` at once.
template <class Sum, class Put>
__device__ inline void for_sums(int64_t rows, int columns, int lanes, Sum sum, Put put) {
  for (int64_t row = warp_of_blocks(0); row < rows; row += warps_of_blocks(gridDim.x)) {
    for (int first = 0; first < columns; first += kWarpSize / lanes) {
      const int column = first + lane() / lanes;
      const auto found = sum(row * columns + min(column, columns - 1), lane() % lanes);
      if (column < columns && lane() % lanes == 0) put(row, column, found);
    }
  }
}

template <class A>
__device__ inline void put(const Matrix& m, int64_t row, int column, A value) {
  with_floating(m.span.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    *reinterpret_cast<T*>(m.span.at(row, column * m.stride)) = static_cast<T>(value);
  });
}

}  // namespace elbo
