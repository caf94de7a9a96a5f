// How the aggregate posterior is cut for the warps: arithmetic alone.
#pragma once

#include "schedule.h"

namespace elbo {

// Of the z, or of the components, 32 are the lanes of some warps, which meet the others a tile after the other. The
// warps of a group share the latents; each group has a segment of the tiles, whose sums a second launch adds up. All of
// it depends on the sizes alone, so sums are the same on every device.
struct AggregateCut {
  int64_t lane_blocks;  // blocks side by side, of 32 lanes each
  int64_t tiles;        // of a segment
  int64_t segments;
  int32_t latents;        // of a warp
  int32_t warps, groups;  // of a group, of a block

  constexpr int64_t blocks() const {
    return lane_blocks * divided_up(segments, groups);
  }

  constexpr int threads() const {
    return warps * groups * kWarpSize;
  }
};

constexpr int kAggregateWarps = 8;         // of a block, at most
constexpr int64_t kAggregateBlocks = 256;  // two for each SM of a large GPU

// Elements that a tile of the other side has, of which every thread holds a number each.
template <class A>
constexpr int kAggregateTile = sizeof(A) == 4 ? 16 : 8;

// Where there are blocks enough, as many warps share the latents as have nearly the same number of them, and a block
// has several groups. A segment has eight tiles where that makes between one and two times as many blocks.
constexpr AggregateCut aggregate_cut(int64_t lanes, int64_t others, int64_t latents, int64_t tile) {
  AggregateCut cut = {divided_up(lanes, kWarpSize), 0, 0, 0, kAggregateWarps, 1};
  const int64_t tiles = divided_up(others, tile), all = cut.lane_blocks * tiles;
  if (all >= kAggregateBlocks) {
    while (cut.warps > 1 && divided_up(latents, cut.warps) * cut.warps * 4 > latents * 5) cut.warps /= 2;
  }
  cut.latents = static_cast<int32_t>(divided_up(latents, cut.warps));
  while (2 * cut.groups * cut.warps <= kAggregateWarps && 2 * cut.groups * kAggregateBlocks <= all) cut.groups *= 2;
  const int64_t most = all / (cut.groups * kAggregateBlocks);
  cut.tiles = std::max<int64_t>(1, std::clamp<int64_t>(8, most / 2, most));
  cut.segments = divided_up(tiles, cut.tiles);
  return cut;
}

}  // namespace elbo
