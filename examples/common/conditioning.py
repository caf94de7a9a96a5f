"""Layers that tell a network which β it works at. Each one stands after a layer of the network, and takes its features
h [B, C, ...] and one number n a sample, [B]: `h = layer(h, n)`. Nothing here knows of the rest of the network.

    FiLM           (1 + a·s(n))·h + a·t(n), with s and t two MLPs       YOTO (Dosovitskiy and Djolonga, ICLR 2020)
    Modulation     (1 + s(n))·h + t(n), with (s, t) one MLP             as after normalisations of diffusion models
    SigmoidGate    c·sigmoid(wn + b)·h                                  Multi-Rate VAE (Bae et al., ICLR 2023), encoder
    RootGate       √relu(1 − exp(wn + b))·h                             Multi-Rate VAE, decoder
    RootSigmoid    √sigmoid(wn + b)·h                                   in place of RootGate: never closed for good

What n is belongs to `BetaRange`: log β, or the log level ℓ = log βσ², standardised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BetaRange:
    """The β that one model is trained for, log-uniform between two ends."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(f"β: expected 0 < low < high, got {self.low} and {self.high}")

    def draw(self, count: int, *, device: torch.device | None = None) -> Tensor:
        """One β for each of `count` samples, from the global generator, whose state a checkpoint keeps."""
        return self._at(torch.rand(count, device=device))

    def grid(self, count: int, *, device: torch.device | None = None) -> Tensor:
        """The fixed set of an evaluation: evenly spaced in log β, each in the middle of its part of the range."""
        return self._at((torch.arange(count, device=device) + 0.5) / count)

    def _at(self, share: Tensor) -> Tensor:
        return self.low * (self.high / self.low) ** share

    def standardise(self, log_beta: Tensor) -> Tensor:
        """n: log β with mean 0 and variance 1 over the range, so between −√3 and √3."""
        middle, half = math.log(self.low * self.high) / 2, math.log(self.high / self.low) / 2
        return math.sqrt(3) * (log_beta - middle) / half

    def standardise_level(self, beta: Tensor, log_sigma: Tensor, log_std: float) -> Tensor:
        """n of the level βσ², on the same scale; `log_std`, that of the data, is where log σ starts.

        No gradient goes through it to σ. At the best network the loss does not depend on the level that the network is
        told, to first order, so none is missing there.
        """
        return self.standardise(beta.log() + 2 * (log_sigma.detach() - log_std))


def over_features(values: Tensor, h: Tensor) -> Tensor:
    """[B, C], as it multiplies h [B, C, ...]."""
    return values.reshape(*values.shape, *[1] * (h.ndim - 2))


class FiLM(nn.Module):
    """(1 + a·s(n))·h + a·t(n): two MLPs of one hidden layer each, which share nothing.

    YOTO has one after the last convolution of each block, before its activation; the last block of its encoder has no
    activation. `strength` a and `hidden` are its values. Its MLPs see (log β, log of the error's weight), of which the
    second is 0 within 0.001.
    """

    def __init__(self, channels: int, *, hidden: int = 256, strength: float = 0.01) -> None:
        super().__init__()
        self.strength = strength
        self.scale, self.shift = (
            nn.Sequential(nn.Linear(1, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, channels)) for _ in range(2)
        )

    def forward(self, h: Tensor, n: Tensor) -> Tensor:
        scale, shift = (over_features(net(n[:, None]), h) for net in (self.scale, self.shift))
        return (1 + self.strength * scale) * h + self.strength * shift


class Modulation(nn.Module):
    """(1 + s(n))·h + t(n): one MLP puts out both, and starts at 0, so that the layer starts as the identity.

    Its place is after a normalisation, as in "adaptive group normalisation" (Dhariwal and Nichol, NeurIPS 2021). What
    stands before one, as FiLM at the end of a block does, has its scale divided out again.
    """

    def __init__(self, channels: int, *, hidden: int = 64) -> None:
        super().__init__()
        last = nn.Linear(hidden, 2 * channels)
        self.net = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, h: Tensor, n: Tensor) -> Tensor:
        scale, shift = (over_features(part, h) for part in self.net(n[:, None]).chunk(2, dim=1))
        return (1 + scale) * h + shift


class Gate(nn.Module):
    """gate(wn + b)·h. The initial w and b are PyTorch's for one input: uniform in [−1, 1], as in the papers' code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.affine = nn.Linear(1, channels)

    def gate(self, a: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, h: Tensor, n: Tensor) -> Tensor:
        return over_features(self.gate(self.affine(n[:, None])), h) * h


class SigmoidGate(Gate):
    """c·sigmoid(wn + b)·h. What made the paper's figures has c = 2, so that it starts about 1; later code has c = 1."""

    def __init__(self, channels: int, *, factor: float = 2.0) -> None:
        super().__init__(channels)
        self.factor = factor

    def gate(self, a: Tensor) -> Tensor:
        return self.factor * torch.sigmoid(a)


class RootGate(Gate):
    """√relu(1 − exp(wn + b))·h: closed where wn + b ≥ 0, and without gradient there.

    With n = ℓ it is what a linear VAE's columns do, exactly. Under the papers' initialisation one gate of 4√3 (14%) is
    closed for every β of the range, and stays so: b > √3·|w|. `open` starts all of them open instead.
    """

    def __init__(self, channels: int, *, open: bool = False) -> None:
        super().__init__(channels)
        if open:
            nn.init.constant_(self.affine.weight, 1.0)
            nn.init.constant_(self.affine.bias, -2.0)  # below −√3: open from end to end

    def gate(self, a: Tensor) -> Tensor:
        gap = -torch.expm1(a.clamp_max(0))
        # Under the root of a closed gate stands 1, not 0: the root's slope at 0 is infinite, and 0 times it NaN. So is
        # 0 times the slope of exp, where that overflows.
        return torch.where(gap > 0, gap, 1.0).sqrt() * (gap > 0)

    @torch.no_grad()
    def closed(self) -> Tensor:
        """[C]: which gates are closed for every β of the range, whose ends are ∓√3."""
        ends = self.affine(torch.tensor([[-math.sqrt(3)], [math.sqrt(3)]]).to(self.affine.weight))
        return (ends >= 0).all(0)


class RootSigmoid(Gate):
    """√sigmoid(wn + b)·h: RootGate's range, with a gradient everywhere."""

    def gate(self, a: Tensor) -> Tensor:
        return torch.sigmoid(a).sqrt()
