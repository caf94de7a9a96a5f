"""KL(q(z_k) ‖ N(0, 1)) of each channel of the aggregate posterior, by quadrature: no samples, and so no noise.

q(z_k) is a mixture of N Gaussians in one dimension, and with H(q) = −∫ q log q its divergence from the prior is

    KL = ½ mean(μ² + s²) + ½ log 2π − H(q)

so that only the entropy needs an integral. The line is halved into panels until each is no wider than PANEL times the
narrowest component that reaches into it, on which Gauss–Legendre with NODES nodes is exact to rounding: narrow
components cost fine panels only where they are, and none can slip between the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

REACH = 8.0  # standard deviations beyond which a component is nothing: 1e-15 of its mass
PANEL, NODES = 3.0, 16
CHUNK = 1 << 20  # components times panels, or densities, held at once


def channel_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z_k) ‖ N(0, 1)) in nats, [K] in float64, of q(z) = mean_j N(z; mu_j, exp(logvar_j)), each [N, K]."""
    mu, std = mu.double(), (0.5 * logvar.double()).exp()
    entropies = [_entropy(m, s) for m, s in zip(mu.T.contiguous(), std.T.contiguous(), strict=True)]
    return 0.5 * (mu.square() + std.square()).mean(0) + 0.5 * math.log(2 * math.pi) - torch.stack(entropies)


def channel_density(at: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """q(z_k) of one channel at points [P], for a picture; mu and logvar are [N]."""
    mu, std = mu.double(), (0.5 * logvar.double()).exp()
    chunks = at.double().split(max(1, CHUNK // len(mu)))
    return torch.cat([_normal(chunk[:, None], mu, std).mean(1) for chunk in chunks])


def _entropy(mu: Tensor, std: Tensor) -> Tensor:
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(NODES))
    total = mu.new_zeros(())
    for left, width, reached in _panels(mu, std):
        z = left[:, None] + 0.5 * width[:, None] * (nodes + 1)
        density = torch.zeros_like(z)
        for panel, component in zip(*(index.split(CHUNK // NODES) for index in reached), strict=True):
            part = _normal(z[panel], mu[component, None], std[component, None])
            density.index_add_(0, panel, part)
        density /= len(mu)
        total -= (0.5 * width[:, None] * weights * torch.xlogy(density, density)).sum()
    return total


def _panels(mu: Tensor, std: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """Groups of panels: left ends, widths, and the pairs (panel, component) where that one reaches into this."""
    low, high = mu - REACH * std, mu + REACH * std
    at_once = max(1, CHUNK // len(mu))
    left, width = low.min().view(1), (high.max() - low.min()).view(1)
    waiting = [(left, width)]
    while waiting:
        left, width = waiting.pop()
        reaches = (low < (left + width)[:, None]) & (high > left[:, None])
        narrowest = torch.where(reaches, std, math.inf).amin(1)  # infinite where nothing reaches: no density at all
        fine = width <= PANEL * narrowest
        done = fine & narrowest.isfinite()
        if done.any():
            yield left[done], width[done], reaches[done].nonzero(as_tuple=True)
        half = width[~fine] / 2
        if len(half):
            ends = torch.cat([left[~fine], left[~fine] + half]).split(at_once)
            waiting += zip(ends, half.repeat(2).split(at_once), strict=True)


def _normal(z: Tensor, mu: Tensor, std: Tensor) -> Tensor:
    return torch.exp(-0.5 * ((z - mu) / std).square()) / (std * math.sqrt(2 * math.pi))
