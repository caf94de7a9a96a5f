"""Pictures that need no download: coloured shapes, plain or striped, on a gradient, 32×32 in 8-bit colour."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COUNT, SIZE, OBJECTS = 4000, 32, 2
KINDS = 5  # disc, ring, triangle, square, star


def sprites(count: int = COUNT, size: int = SIZE, seed: int = 0) -> Tensor:
    """[count, 3, size, size], uint8. What is drawn last lies on top; edges are soft over one pixel."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1)), generator=generator)

    axis = (torch.arange(size) + 0.5) / size - 0.5
    y, x = axis.view(1, size, 1), axis.view(1, 1, size)
    angle = uniform(0, 2 * math.pi)
    ramp = (0.5 + 0.7 * (x * angle.cos() + y * angle.sin())).unsqueeze(1)
    canvas = torch.lerp(uniform(0.05, 0.75, 3, 1, 1), uniform(0.05, 0.75, 3, 1, 1), ramp)
    for _ in range(OBJECTS):
        kind = torch.randint(KINDS, (count, 1, 1), generator=generator)
        radius, angle = uniform(0.18, 0.33), uniform(0, 2 * math.pi)
        dx, dy = x - uniform(-0.28, 0.28), y - uniform(-0.28, 0.28)
        u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
        cover = (size * _inside(kind, u, v, radius) + 0.5).clamp(0, 1)
        stripes = (uniform(0, 1) < 0.5) & (torch.sin(2 * math.pi * u / uniform(0.18, 0.28)) > 0)
        shade = torch.where(stripes, uniform(0.25, 0.6), 1.0)
        canvas = torch.lerp(canvas, _vivid(uniform(0, 1, 1, 1)) * shade.unsqueeze(1), cover.unsqueeze(1))
    return (255 * canvas).clamp(0, 255).round().to(torch.uint8)


def _inside(kind: Tensor, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """About how far inside the shape's edge a point lies; negative outside."""
    rho, theta = torch.hypot(u, v), torch.atan2(v, u)

    def polygon(corners: int) -> Tensor:
        sector = 2 * math.pi / corners
        return radius * math.cos(sector / 2) - rho * torch.cos(theta.remainder(sector) - sector / 2)

    ring = 0.28 * radius - (rho - 0.75 * radius).abs()
    star = radius * (0.7 + 0.3 * torch.cos(5 * theta)) - rho
    shapes = torch.stack(torch.broadcast_tensors(radius - rho, ring, polygon(3), polygon(4), star))
    return shapes.gather(0, kind.expand(shapes.shape[1:]).unsqueeze(0))[0]


def _vivid(hue: Tensor) -> Tensor:
    """[N, 1, 1] -> [N, 3, 1, 1]: a saturated colour."""
    phase = hue.unsqueeze(1) + torch.tensor([0.0, 1 / 3, 2 / 3]).view(1, 3, 1, 1)
    return 0.55 + 0.45 * torch.cos(2 * math.pi * phase)
