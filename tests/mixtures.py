"""Mixtures of posteriors and points drawn from them, for the tests of `log_aggregate_posterior`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Normal

F64 = torch.float64


def inputs(batch: int, components: int, latents: int, dtype: torch.dtype = F64) -> list[Tensor]:
    mu, logvar = torch.randn(components, latents, dtype=F64), torch.randn(components, latents, dtype=F64) - 1
    drawn = mu[:batch] + (0.5 * logvar[:batch]).exp() * torch.randn(batch, latents, dtype=F64)
    return [t.to(dtype).requires_grad_() for t in (drawn, mu, logvar)]


def literal(z: Tensor, mu: Tensor, logvar: Tensor, size: int | None = None, own: bool = True) -> tuple[Tensor, Tensor]:
    """The B×M×K tensor as a whole, by torch.distributions."""
    batch, components = z.shape[0], mu.shape[0]
    weights = torch.full((batch, components), 1 / components, dtype=z.dtype)
    if own and size is not None:
        weights.fill_((size - 1) / (size * max(components - 1, 1)))
        weights[range(batch), range(batch)] = 1 / size
    log_density = Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None])
    joint = torch.logsumexp(log_density.flatten(2).sum(2) + weights.log(), 1)
    return joint, torch.logsumexp(log_density + weights.log().reshape(*weights.shape, *[1] * (z.dim() - 1)), 1)


def grads_of(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    weights = [torch.randn(t.shape, dtype=F64).to(t.dtype) for t in outputs]
    return torch.autograd.grad(outputs, leaves, weights)
