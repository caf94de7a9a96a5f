// The CPU kernels of the aggregate posterior, without tensors: bindings.cpp turns tensors into matrices.
#pragma once

#include "../aggregate.h"
#include "elbo.h"

namespace elbo {

struct MixtureOf {
  Matrix z, mu, logvar;
  int64_t own;
  MixtureWeights log_weights;
};

// joint: [batch, 1]; marginals: [batch, latents]; of the compute type.
template <class A>
void aggregate(const MixtureOf& mixture, const Matrix& joint, const Matrix& marginals);

struct SumsGiven {
  Matrix joint, marginals, grad_joint, grad_marginals;  // the last two may be absent
};

// gradients: of z, mu and logvar; those that are wanted.
template <class A>
void aggregate_grads(const MixtureOf& mixture, const SumsGiven& given, const Matrix (&gradients)[3]);

}  // namespace elbo
