"""The latents of a hierarchical VAE, for the tests of `gaussian_kl` of lists."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from cases import to
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fused_elbo import gaussian_kl

SHAPES = ((3,), (16, 1, 1), (2, 9, 7), (5000,), (4, 8, 8))


class Hierarchy:
    """Latents of `shapes`, the first without a prior, the second with one that the batch shares."""

    def __init__(self, *dtypes: torch.dtype, batch: int = 3, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> None:
        each = list(itertools.islice(itertools.cycle(dtypes), len(shapes)))
        self.mu, self.logvar, self.prior = (), (), ()
        for i, (shape, dtype) in enumerate(zip(shapes, each, strict=True)):
            of_prior = shape if i == 1 else (batch, *shape)
            m, l, m_p, l_p = (0.5 * torch.randn(s) for s in ((batch, *shape), (batch, *shape), of_prior, of_prior))
            self.mu += (to(m, dtype),)
            self.logvar += (to(l, dtype),)
            self.prior += (None if i == 0 else to((m_p, l_p), dtype),)

    def leaves(self) -> list[Tensor]:
        return [*self.mu, *self.logvar, *(t for p in self.prior if p is not None for t in p)]

    def double(self) -> Hierarchy:
        other = object.__new__(Hierarchy)
        other.mu, other.logvar = to(self.mu, torch.float64), to(self.logvar, torch.float64)
        other.prior = to(self.prior, torch.float64)
        return other

    def rate(self, **options: Any) -> Tensor:
        return gaussian_kl(self.mu, self.logvar, prior=self.prior, **options)

    def flat(self) -> list[Tensor | None]:
        """As the operators take them."""
        tensors: list[Tensor | None] = []
        for m, l, prior in zip(self.mu, self.logvar, self.prior, strict=True):
            full = (None, None) if prior is None else tuple(t.detach().expand(m.shape) for t in prior)
            tensors += [m.detach(), l.detach(), *full]
        return tensors

    def literal(self, free_bits: float = 0.0, per_level: bool = False) -> Tensor:
        """[B], or [B, L], by torch.distributions."""
        rates = []
        for m, l, prior in zip(self.mu, self.logvar, self.prior, strict=True):
            p = Normal(0.0, 1.0) if prior is None else Normal(prior[0], (0.5 * prior[1]).exp())
            kl = kl_divergence(Normal(m, (0.5 * l).exp()), p)
            rates.append((kl.clamp(min=free_bits) if free_bits else kl).flatten(1).sum(1))
        return torch.stack(rates, 1) if per_level else torch.stack(rates).sum(0)
