"""Imported first by the tests in other people's training code: the way to the examples, images, the plain formula."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))  # train_vae's model, and the recipes


def blobs(count: int, channels: int, side: int) -> Tensor:
    """Images that a VAE can learn: a bright spot each, with its own place, width and colour."""
    at = torch.linspace(-1, 1, side)
    x, y = 1.2 * torch.rand(2, count, 1, 1, 1) - 0.6
    near = (-((at - x) ** 2 + (at[:, None] - y) ** 2) / (0.1 + 0.3 * torch.rand(count, 1, 1, 1))).exp()
    return near * (0.3 + 0.7 * torch.rand(count, channels, 1, 1))


def by_hand(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, log_sigma: Tensor, beta: float) -> Tensor:
    """The mean over samples of distortion + β · rate, in nats."""
    squares = (recon - x) ** 2 / (2 * (2 * log_sigma).exp()) + log_sigma + math.log(2 * math.pi) / 2
    kl = (mu**2 + logvar.exp() - 1 - logvar) / 2
    return (squares.sum() + beta * kl.sum()) / len(x)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor's difference, as a part of its size. Some have none but rounding, as the bias of a convolution whose
    channels are then normalised one by one: their size is taken to be a hundredth of the largest one's."""
    assert ours.keys() == theirs.keys()
    least = max(expected.norm() for expected in theirs.values()) / 100
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= tolerance * max(expected.norm(), least), name


def assert_falls(losses: Iterable[float]) -> None:
    """From the first tenth to the last one, by more than what their noise is."""
    values = torch.tensor(list(losses), dtype=torch.float64)
    tenth = max(3, len(values) // 10)
    first, last = values[:tenth], values[-tenth:]
    assert last.max() < first.min(), values
