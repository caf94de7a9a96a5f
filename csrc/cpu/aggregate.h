// The CPU kernels of the aggregate posterior, without tensors: bindings.cpp turns tensors into matrices.
#pragma once

#include "../mixture.h"
#include "elbo.h"

namespace elbo {

// joint: [batch, 1]; marginals: [batch, latents]; of the compute type.
template <class A>
void aggregate(const MixtureOf& mixture, const Matrix& joint, const Matrix& marginals);

template <class A>
void aggregate_grads(const MixtureOf& mixture, const SumsGiven& given, const MixtureGradients& gradients);

}  // namespace elbo
