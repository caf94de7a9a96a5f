"""A linear VAE for every β, and what its layers' gates have to be. common/linear.py has the optimum at one β.

At the optimum all that β and σ do is the level βσ². With ℓ its logarithm and u_i = ℓ − log λ_i, a latent has

    the decoder's column        √λ_i·√relu(1 − e^{u_i})
    the encoder's row           the same over λ_i
    the log posterior variance  min(0, u_i)

so gates of the form √relu(1 − exp(wn + b)) are exact if n is ℓ, affinely. Under SSE + β'·rate the level is β'/2, and n
may be log β'. Decoupled, with K active dimensions, ℓ = log β + log Σ_inactive λ − log(D − βK), whose slope in log β is
1 + βK/(D − βK): no affine function of log β, so that no gates in log β are exact at three β of one K > 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import linear
from .conditioning import FiLM, RootGate, RootSigmoid, SigmoidGate
from .models import VAEOutput


class Point(NamedTuple):
    rate: float
    sse: float


def at_level(eigenvalues: Tensor, latents: int, level: float) -> Point:
    """The best linear VAE at this level βσ², whatever β and σ make it up."""
    carried = eigenvalues[:latents]
    rate = 0.5 * float((carried / level).log().clamp_min(0).sum())
    return Point(rate, float(eigenvalues[latents:].sum() + carried.clamp_max(level).sum()))


def shared_variance(eigenvalues: Tensor, latents: int, betas: Sequence[float]) -> float:
    """σ̄² of the closed form over a batch of these β: the mean error at the levels βσ̄², over D.

    That mean over σ̄² falls as σ̄² grows, from infinity, so there is one solution, and halving finds it.
    """
    low, high = 0.0, float(eigenvalues.mean())
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        error = np.mean([at_level(eigenvalues, latents, beta * middle).sse for beta in betas]) / len(eigenvalues)
        low, high = (middle, high) if error > middle else (low, middle)
    return high


class Ramp(nn.Module):
    """n [B] -> log posterior variance min(0, wn + b) [B, K]. It starts below 0 from end to end of the range."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.affine = nn.Linear(1, latents)
        nn.init.constant_(self.affine.weight, 1.0)
        nn.init.constant_(self.affine.bias, -2.0)

    def forward(self, n: Tensor) -> Tensor:
        return self.affine(n[:, None]).clamp_max(0)


class Curves(nn.Module):
    """n [B] -> log posterior variance [B, K], by an MLP: whatever functions of n they are."""

    def __init__(self, latents: int, hidden: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, latents))

    def forward(self, n: Tensor) -> Tensor:
        return self.net(n[:, None])


Layer = Callable[[int], nn.Module]
LAYERS: dict[str, tuple[Layer, Layer, Layer]] = {  # after the encoder, before the decoder, the posterior's variance
    "gates": (lambda k: RootGate(k, open=True), lambda k: RootGate(k, open=True), Ramp),
    "multi-rate": (SigmoidGate, RootGate, Ramp),
    "root-sigmoid": (SigmoidGate, RootSigmoid, Ramp),
    "film": (FiLM, FiLM, Curves),
}


class ConditionedLinearVAE(nn.Module):
    """linear.LinearVAE with a layer of LAYERS for each of its latents at both ends, and logvar a function of n."""

    def __init__(self, dims: int, latents: int, scale: float, layers: str) -> None:
        super().__init__()
        self.scale = scale
        self.encoder = nn.Linear(dims, latents, bias=False)
        self.decoder = nn.Linear(latents, dims, bias=False)
        self.after, self.before, self.logvar = (layer(latents) for layer in LAYERS[layers])

    def forward(self, x: Tensor, n: Tensor) -> VAEOutput:
        mu, logvar = self.after(self.encoder(x / self.scale), n), self.logvar(n)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return VAEOutput(self.scale * self.decoder(self.before(z, n)), mu, logvar, None)


class Best(NamedTuple):
    excess: Tensor  # [P]: loss above the exact optimum at each β, at the best σ of each, in nats
    rate: Tensor  # [P]


def best_affine_gates(eigenvalues: Tensor, latents: int, betas: Sequence[float], told: Sequence[float]) -> Best:
    """The least mean loss over these β that gates and Ramp can have, all affine in the number `told` beside each β.

    Encoder's and decoder's gates, their lengths and the variances have affine functions of their own. The loss is exact
    (x and z are Gaussian), the axes those of the covariance. The search starts at the affine function nearest to ℓ.
    """
    exact = [linear.optimum(eigenvalues, latents, beta) for beta in betas]
    carried, rest, dims = eigenvalues[:latents], float(eigenvalues[latents:].sum()), len(eigenvalues)
    n, beta = (torch.tensor(values, dtype=torch.float64) for values in (told, betas))
    slope, start = np.polyfit(told, [math.log(point.level) for point in exact], 1)
    w, b = torch.full_like(carried, float(slope)), start - carried.log()
    parameters = torch.stack([w, b, w, b, w, b, torch.zeros_like(w), torch.zeros_like(w)]).requires_grad_()

    def gate(a: Tensor) -> Tensor:
        return (-torch.expm1(a)).clamp_min(1e-12).sqrt()

    def loss() -> tuple[Tensor, Tensor]:
        lines = parameters[:6:2] * n[:, None, None] + parameters[1:6:2]  # [P, 3, K]
        encoder = gate(lines[:, 0]) * parameters[6].exp() / carried.sqrt()
        decoder = gate(lines[:, 1]) * parameters[7].exp() * carried.sqrt()
        logvar = lines[:, 2].clamp_max(0)
        sse = rest + (carried * (1 - decoder * encoder).square() + decoder.square() * logvar.exp()).sum(1)
        rate = 0.5 * (encoder.square() * carried + logvar.exp() - 1 - logvar).sum(1)
        return dims / 2 * ((2 * math.pi * sse / dims).log() + 1) + beta * rate, rate

    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        mean = loss()[0].mean()
        mean.backward()
        return mean

    optimizer.step(closure)
    with torch.no_grad():
        found, rate = loss()
    lowest = [point.distortion + b * point.rate for point, b in zip(exact, betas, strict=True)]
    return Best(found - torch.tensor(lowest, dtype=torch.float64), rate)
