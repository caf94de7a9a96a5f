// The launch functions of a hierarchy's levels, without tensors, as those of elbo.h.
#pragma once

#include <vector>

#include "elbo.h"

namespace elbo {

// A level as a kernel is told of it: `Latents`, their gradients and their chunks in less space. Pointers: of mu,
// logvar, prior_mu and prior_logvar; null where there is no such tensor, or its gradient is not wanted.
struct Level {
  char* tensors[4];
  int64_t strides[4];  // between samples, in elements
  char* gradients[4];
  const char* grad;  // ∂L/∂ the rate of the first sample
  int64_t dims, chunk_size, chunks_per_sample;
  int64_t first_chunk;    // of a launch's, all samples' of one level before those of the next
  int64_t first_partial;  // of a sample's
  ScalarType dtypes[4];
  int32_t index;  // in the hierarchy
};

// Levels of one launch: a kernel's arguments are 4 kB at most.
constexpr int kLevels = 24;
// Of which one launch adds up the partial sums.
constexpr int kSummedLevels = 512;

struct LevelsBatch {
  int64_t size = 0;
  bool is_double = false;  // all is computed in double then
  double free_bits = 0;
  int64_t partials = 0;  // of a sample: one for each chunk of each level
  std::vector<Level> levels;
};

LevelsBatch chunked(int64_t batch, bool is_double, const std::vector<Latents>& levels);

// partials: [batch, partials]. rates: [batch, levels] where `per_level`, else the sums over the levels, [batch]. All of
// the compute type.
void elbo_levels(const LevelsBatch& batch, void* partials, void* rates, bool per_level, cudaStream_t stream);

// grads: ∂L/∂ the rates of each level.
void elbo_levels_grads(
    LevelsBatch batch, const std::vector<Number>& grads, const std::vector<Gradients>& gradients, cudaStream_t stream);

}  // namespace elbo
