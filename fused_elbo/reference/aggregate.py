"""log q̂ of a mixture of posteriors, and its gradients, in plain PyTorch (../operators/aggregate.py).

    L_i  = logsumexp_j(log w_ij + Σ_k a_ijk)      p_ij  = exp(log w_ij + Σ_k a_ijk − L_i)
    M_ik = logsumexp_j(log w_ij + a_ijk)          r_ijk = exp(log w_ij + a_ijk − M_ik)
    a_ijk = log N(z_ik; μ_jk, exp l_jk)           W_ijk = g_i p_ij + h_ik r_ijk,  g = ∂/∂L, h = ∂/∂M

    ∂z_ik = Σ_j W_ijk ∂a/∂z      ∂μ_jk = Σ_i W_ijk ∂a/∂μ      ∂l_jk = Σ_i W_ijk ∂a/∂l

The rows of z are taken in chunks, so that what is B·M·K large is never there as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..call import GradLogSums, LogSums, Mixture, MixtureGradients, compute_dtype
from .math import log_normal, log_normal_grad, mixture_weights

_AT_ONCE = 1 << 21  # elements of B·M·K


def aggregate(mixture: Mixture) -> LogSums:
    mixture = _computed(mixture)
    _, mu, logvar, *_ = mixture
    joints, marginals = [], []
    for first, rows in _chunks(mixture):
        weights = _weights(first, rows, mixture)
        a = log_normal(rows[:, None], mu, logvar)
        joints.append(torch.logsumexp(a.sum(2) + weights, 1))
        marginals.append(torch.logsumexp(a + weights[:, :, None], 1))
    return LogSums(torch.cat(joints), torch.cat(marginals))


def aggregate_grads(mixture: Mixture, sums: LogSums, grad_sums: GradLogSums, mask: int) -> MixtureGradients:
    given, mixture = mixture, _computed(mixture)
    _, mu, logvar, *_ = mixture
    of_z, of_mu, of_logvar = [], torch.zeros_like(mu), torch.zeros_like(logvar)
    for first, rows in _chunks(mixture):
        at = slice(first, first + rows.shape[0])
        weights = _weights(first, rows, mixture)
        a = log_normal(rows[:, None], mu, logvar)
        factors = torch.zeros_like(a)
        if grad_sums.joint is not None:
            p = (a.sum(2) + weights - sums.joint[at, None]).exp()
            factors = factors + (grad_sums.joint[at, None] * p)[:, :, None]
        if grad_sums.marginals is not None:
            r = (a + weights[:, :, None] - sums.marginals[at, None]).exp()
            factors = factors + grad_sums.marginals[at, None] * r
        slopes = log_normal_grad(rows[:, None], mu, logvar)
        of_z.append((factors * slopes.z).sum(1))
        of_mu = of_mu + (factors * slopes.mu).sum(0)
        of_logvar = of_logvar + (factors * slopes.logvar).sum(0)
    found = (torch.cat(of_z), of_mu, of_logvar)
    pairs = zip(given[:3], found, strict=True)
    return MixtureGradients(*[_like(*pair) if mask >> i & 1 else None for i, pair in enumerate(pairs)])


def _computed(mixture: Mixture) -> Mixture:
    dtype = compute_dtype(*mixture[:3])
    z, mu, logvar, own, dataset_size = mixture
    return Mixture(z.to(dtype), mu.to(dtype), logvar.to(dtype), own, dataset_size)


def _like(given: Tensor, gradient: Tensor) -> Tensor:
    """As the operator promises it."""
    gradient, wanted = gradient.to(given.dtype), torch.empty_like(given)
    return gradient if gradient.stride() == wanted.stride() else wanted.copy_(gradient)


def _chunks(mixture: Mixture) -> Iterator[tuple[int, Tensor]]:
    """The first row of each, and its rows."""
    z = mixture.z
    if torch.compiler.is_compiling() or isinstance(z.shape[0], torch.SymInt):  # of a size that is open
        yield 0, z
        return
    rows = max(1, _AT_ONCE // max(1, mixture.mu.numel()))
    for first in range(0, max(1, z.shape[0]), rows):
        yield first, z[first : first + rows]


def _weights(first: int, rows: Tensor, mixture: Mixture) -> Tensor:
    """log w_ij of some rows, [rows, M]."""
    mu, own, dataset_size = mixture.mu, mixture.own, mixture.dataset_size
    components = mu.shape[0]
    of_own, of_others = mixture_weights(components, own >= 0, dataset_size)
    i = torch.arange(rows.shape[0], device=mu.device)[:, None] + (first + own)
    j = torch.arange(components, device=mu.device)
    weights = mu.new_full((rows.shape[0], components), of_others)
    return (weights.masked_fill(i == j, of_own) if own >= 0 else weights).log()
