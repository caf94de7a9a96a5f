"""Do the latents of two encoders say the same, number by number? What aligned_posteriors.py measures.

C_jk = corr_x(mu_j(x), mu'_k(x)) over images x. One model that is told β may keep each latent's meaning as β changes:
then the diagonal of |C| is large. Models that were trained apart number their latents as they happen to, so they are
given the permutation that makes the sum of |C| largest, and its signs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

CONSTANT = 1e-6  # a latent whose mean spreads less over the images is told nothing: no correlation, in place of noise


class Match(NamedTuple):
    order: Tensor  # [K]: latent `order[j]` of the second encoder stands for latent j of the first
    sign: Tensor  # [K], ±1


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """[K, K'] of the columns of [N, K] and [N, K'], in float64; 0 where a column is constant."""
    a, b = (_standard(t.double()) for t in (a, b))
    return a.T @ b / len(a)


def _standard(t: Tensor) -> Tensor:
    std = t.std(0, correction=0)
    return torch.where(std > CONSTANT, (t - t.mean(0)) / std.clamp_min(CONSTANT), 0.0)


def by_number(c: Tensor) -> Match:
    """Each latent for its own number, whatever the correlation says."""
    return Match(torch.arange(len(c)), torch.ones(len(c), dtype=c.dtype))


def best(c: Tensor) -> Match:
    """The permutation with the largest sum of |C|, and the signs of what it matches."""
    _, columns = linear_sum_assignment(-c.abs().numpy())
    order = torch.from_numpy(columns)
    return Match(order, torch.where(c[torch.arange(len(c)), order] < 0, -1.0, 1.0).to(c.dtype))


def agreement(c: Tensor, match: Match, used: Tensor) -> float:
    """Mean of |C| over the matches of the latents that are used, [K] of bool; NaN where none is."""
    return float(c.abs()[torch.arange(len(c)), match.order][used].mean())


def renumbered(z: Tensor, match: Match) -> Tensor:
    """z [N, K] of the first encoder, as latents of the second one's decoder."""
    out = torch.empty_like(z)
    out[:, match.order] = z * match.sign.to(z.dtype)
    return out


def as_first(t: Tensor, match: Match) -> Tensor:
    """Latents [N, K] of the second encoder in the first one's order and signs."""
    return t[:, match.order] * match.sign.to(t.dtype)
