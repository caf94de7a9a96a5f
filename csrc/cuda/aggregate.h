// The launch functions of the aggregate posterior, without tensors, as those of elbo.h.
#pragma once

#include <cuda_runtime.h>

#include "../mixture.h"
#include "aggregate_cut.h"

namespace elbo {

// A launch over one side's elements, and what it needs of a workspace: numbers of the compute type.
struct AggregateLaunch {
  AggregateCut cut;
  int64_t partials;      // of all segments
  int64_t fields;        // of all blocks, where a block's do not fit on chip
  int64_t shared_bytes;  // of a block, where they do

  int64_t workspace() const {
    return partials + fields;
  }
};

struct AggregateGradsLaunches {
  AggregateLaunch of_points, of_components;

  int64_t workspace() const {
    return of_points.workspace() + of_components.workspace();
  }
};

AggregateLaunch aggregate_launch(const MixtureOf& mixture, bool is_double);
AggregateGradsLaunches aggregate_grads_launches(
    const MixtureOf& mixture, bool is_double, const MixtureGradients& wanted);

// joint: [batch, 1]; marginals: [batch, latents]; of the compute type.
void aggregate(
    const MixtureOf& mixture, bool is_double, const AggregateLaunch& launch, void* workspace, const Matrix& joint,
    const Matrix& marginals, cudaStream_t stream);

// given: of the compute type
void aggregate_grads(
    const MixtureOf& mixture, const SumsGiven& given, bool is_double, const AggregateGradsLaunches& launches,
    void* workspace, const MixtureGradients& gradients, cudaStream_t stream);

}  // namespace elbo
