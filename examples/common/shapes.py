"""One white shape on black in every pose of a grid, as in dSprites: 6144 pictures of 32×32, and what each one shows.

The set is the whole population: a picture drawn from it has exactly log 6144 = 8.7232 nats, which bound what any code
can know of it. That needs pictures that differ, so the angles end before π: over a full turn a rectangle and an ellipse
would show each picture twice.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from .data import Images, halve

SIZE, SUPERSAMPLED = 32, 4
FACTORS = {"shape": 3, "scale": 4, "angle": 8, "x": 8, "y": 8}  # and the number of values of each
COUNT = math.prod(FACTORS.values())
NAMES = ("rectangle", "ellipse", "heart")


def factors() -> Tensor:
    """[6144, 5]: the value of each factor, counted from 0; the last one changes fastest."""
    return torch.cartesian_prod(*(torch.arange(size) for size in FACTORS.values()))


@functools.cache
def shapes() -> Tensor:
    """[6144, 1, 32, 32], uint8, in the order of `factors`. Each pixel is the mean of 4×4 points."""
    points = SIZE * SUPERSAMPLED
    axis = (torch.arange(points) + 0.5) / points
    places = torch.linspace(0.3, 0.7, FACTORS["x"])
    dx = axis - places.view(-1, 1, 1, 1)  # [x, 1, 1, points]
    dy = axis.view(-1, 1) - places.view(1, -1, 1, 1)  # [1, y, points, 1]
    scales = torch.linspace(0.2, 0.4, FACTORS["scale"]).tolist()
    angles = (math.pi * torch.arange(FACTORS["angle"]) / FACTORS["angle"]).tolist()
    drawn = []
    for kind, scale, angle in itertools.product(NAMES, scales, angles):
        u = (dx * math.cos(angle) + dy * math.sin(angle)) / scale
        v = (dy * math.cos(angle) - dx * math.sin(angle)) / scale
        cover = _inside(kind, u, v).float().flatten(0, 1)
        drawn.append(torch.nn.functional.avg_pool2d(cover.unsqueeze(1), SUPERSAMPLED))
    return (255 * torch.cat(drawn)).round().to(torch.uint8)


def population() -> Images:
    """For a trainer, halved to 16×16, where all pictures still differ and models train in half the time.

    There is nothing outside of it to generalise to, so it is trained on and measured as a whole; a twelfth of it stands
    in for the validation split.
    """
    images = halve(shapes())
    return Images(train=images, val=images[::12], test=images)


def _inside(kind: str, u: Tensor, v: Tensor) -> Tensor:
    if kind == "rectangle":
        return (u.abs() < 0.5) & (v.abs() < 0.3)
    if kind == "ellipse":
        return (u / 0.5).square() + (v / 0.28).square() < 1
    u, v = u / 0.42, -v / 0.42
    return (u.square() + v.square() - 1) ** 3 < u.square() * v**3
