// How a batch is laid out on chip for elbo_step, and whether it fits: arithmetic alone.
#pragma once

#include <algorithm>
#include <cstdint>

namespace elbo {

constexpr int kStepThreads = 512;
constexpr int kStepWarps = kStepThreads / 32;
constexpr int kHeld = 56;  // differences in a thread's registers, of 128: a multiple of every vector, 4 or 8 elements

struct StepPlan {
  bool fits = false;
  int data_blocks = 0, latent_blocks = 0;  // one a multiprocessor
  int rows = 0;                            // of each warp: a vector of each of its lanes
  int64_t shared_bytes = 0;                // of a block, for what registers do not hold
};

// vector: elements in 128 bits of recon. shared_limit: bytes of shared memory that a block may ask for, less what the
// kernel has besides. held: differences in a thread's registers.
constexpr StepPlan step_plan(
    int64_t elements, int64_t latents, int vector, int multiprocessors, int64_t shared_limit, int held = kHeld) {
  StepPlan plan;
  const int64_t rows = (elements + 32 * vector - 1) / (32 * vector), blocks = (rows + kStepWarps - 1) / kStepWarps;
  // The latents' share of the elements, of the blocks: two reads and a write for each, as the data have.
  const int64_t share = (latents * multiprocessors + elements + latents - 1) / (elements + latents);
  plan.latent_blocks = static_cast<int>(std::max<int64_t>(share, 1));
  if (plan.latent_blocks >= multiprocessors) return plan;
  plan.data_blocks = static_cast<int>(std::min<int64_t>(blocks, multiprocessors - plan.latent_blocks));
  const int64_t warps = static_cast<int64_t>(plan.data_blocks) * kStepWarps, each = (rows + warps - 1) / warps;
  plan.shared_bytes = std::max<int64_t>(each - held / vector, 0) * vector * kStepThreads * 4;
  plan.fits = plan.shared_bytes <= shared_limit;
  plan.rows = plan.fits ? static_cast<int>(each) : 0;
  return plan;
}

}  // namespace elbo
