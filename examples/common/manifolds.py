"""Data of known intrinsic dimension."""

from __future__ import annotations

import torch

from .data import Splits

HELD_OUT = 500  # samples for validation, and as many for test


def curved(train: int, *, intrinsic: int, dims: int, noise: float, curvature: float, seed: int) -> Splits:
    """x = Q₁u + curvature·Q₂(u² − 1) + noise, u ~ N(0, I) of `intrinsic` dimensions: parabolas in a random frame.

    Q₁ and Q₂ are orthonormal. With curvature 0 it is a subspace; `noise` is a variance, of every dimension.
    """
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(dims, 2 * intrinsic, generator=generator)).Q
    u = torch.randn(train + 2 * HELD_OUT, intrinsic, generator=generator)
    x = torch.cat([u, curvature * (u.square() - 1)], 1) @ frame.T
    x += noise**0.5 * torch.randn(x.shape, generator=generator)
    return Splits(*x.split([train, HELD_OUT, HELD_OUT]))


def parabola(train: int, *, noise: float, seed: int) -> Splits:
    """Points beside y = x² − ¾ in the plane, x uniform in [−1½, 1½]."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.rand(train + 2 * HELD_OUT, generator=generator) - 1.5
    points = torch.stack([x, x.square() - 0.75], 1)
    points += noise**0.5 * torch.randn(points.shape, generator=generator)
    return Splits(*points.split([train, HELD_OUT, HELD_OUT]))
