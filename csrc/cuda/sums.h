// The memory for partial sums: of the latents, and of the data where asked.
#pragma once

#include "../outputs.h"
#include "elbo.h"

namespace elbo {

struct Sums {
  OptTensor a, kl, clamped, weights;
  Partials partials;

  Sums(const Inputs& in, const ChunkedBatch& batch, bool of_data) {
    if (of_data && batch.data.dims) partials.a = make(a, in, batch.data_chunks);
    if (of_data && batch.data.has_weight) partials.weights = make(weights, in, batch.data_chunks);
    if (batch.latents.dims == 0) return;
    partials.kl = make(kl, in, batch.latent_chunks);
    partials.clamped = batch.latents.has_free_bits ? make(clamped, in, batch.latent_chunks) : partials.kl;
  }

 private:
  static void* make(OptTensor& t, const Inputs& in, const Chunks& chunks) {
    t = empty(in, {chunks.count});
    return t->data_ptr();
  }
};

}  // namespace elbo
