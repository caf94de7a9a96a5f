"""The linear VAE with optimal σ, of which everything is known in closed form: a VAE's rate–distortion curve, exactly.

Encoder, decoder and posterior variance are linear or constant, so only the data's covariance matters. With its
eigenvalues λ_1 ≥ … ≥ λ_D, K < D latents and the loss D/2·log(2πσ²) + D/2 + β·rate, at the optimum σ² = SSE/D:

    dimension i ≤ K is active  ⟺  λ_i > βσ²
    w_i² = λ_i − βσ²           length of the decoder's column for it
    s_i² = βσ²/λ_i             posterior variance
    rate = Σ_active ½ log(λ_i/(βσ²))
    SSE  = Σ_inactive λ_i + K_active·βσ²   =   Dσ²,   and so   σ² = Σ_inactive λ_i / (D − β·K_active)

An active dimension keeps the error βσ² and one that is not its whole variance: reverse water-filling (Cover and Thomas,
"Elements of Information Theory", chapter 10), so this is the rate–distortion function of a Gaussian source, βσ² being
the water level, as long as K does not bind. The level is all that β and σ do: SSE + β'·rate gives the same models, at
the level β'/2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .data import Splits
from .models import VAEOutput


class Optimum(NamedTuple):
    """The best linear VAE. Rate and distortion in nats per sample, sse the squared error per sample."""

    active: int  # dimensions that the code carries
    level: float  # βσ²: the error that each of them keeps
    rate: float
    sse: float
    distortion: float  # at its own σ² = sse/D


def optimum(eigenvalues: Tensor, latents: int, beta: float) -> Optimum:
    """The optimum of D/2·log σ² + β·rate. `eigenvalues`: [D], descending, float64.

    K_active depends on σ², and σ² on it. With dimensions 1 to k active, taking in k + 1 lowers σ² if and only if
    λ_{k+1}(D − βk) > β·Σ_{i>k} λ_i, that is λ_{k+1} > βσ²; and where it does not, neither does any later one, whose
    λ is no larger. So there is one self-consistent K_active, and counting up finds it. That test also fails wherever
    D − β(k + 1) would be 0 or less, for λ_{k+1} is one of the terms on the right.
    """
    dims = len(eigenvalues)
    if not 0 <= latents < dims:
        raise ValueError(f"latents: at least one dimension must be left to σ, got {latents} latents for {dims}")
    k, rest = 0, float(eigenvalues.sum())
    while k < latents and float(eigenvalues[k]) * (dims - beta * k) > beta * rest:
        rest -= float(eigenvalues[k])
        k += 1
    level = beta * rest / (dims - beta * k)
    rate, sse = 0.5 * float((eigenvalues[:k] / level).log().sum()), rest + k * level
    return Optimum(k, level, rate, sse, dims / 2 * (math.log(2 * math.pi * sse / dims) + 1))


def gap(eigenvalues: Tensor, latents: int, beta: float) -> float:
    """rate + distortion − H of the optimum on Gaussian data, whose entropy H is ½ Σ log 2πeλ_i.

    There q(z) is N(0, I) exactly: the gap is all the decoder's, KL(q(x|z) ‖ p(x|z)). In an active direction q(x|z) has
    the variance βσ² where the decoder has σ², in another one λ.
    """
    found = optimum(eigenvalues, latents, beta)
    ratios = eigenvalues[found.active :] * (beta / found.level)
    return 0.5 * (found.active * (beta - 1 - math.log(beta)) + float((ratios - 1 - ratios.log()).sum()))


def switches_off(eigenvalues: Tensor, i: int) -> float:
    """The β from which on dimension i, from 0, carries nothing: there the level βσ² is λ_i. For i = 0, collapse."""
    level, before = eigenvalues[i], eigenvalues[:i]
    return float(len(eigenvalues) * level / (eigenvalues.sum() - (before - level).sum()))


def spectrum(x: Tensor) -> Tensor:
    """Eigenvalues of the covariance of x [N, D], descending, [D] in float64."""
    centred = x.double() - x.double().mean(0)
    few = min(x.shape, key=int)  # of the two Gram matrices the smaller one
    gram = centred.T @ centred if few == x.shape[1] else centred @ centred.T
    found = torch.linalg.eigvalsh(gram / len(x)).flip(0).clamp_min(0)
    return torch.nn.functional.pad(found, (0, x.shape[1] - few))


def gaussian_data(eigenvalues: Tensor, count: int) -> Splits:
    """Samples with this covariance, along random axes. The training part's own covariance, up to a part in √count, is
    what a VAE can learn."""
    generator = torch.Generator().manual_seed(0)
    dims = len(eigenvalues)
    axes = _axes(dims, generator)
    x = torch.randn(count + count // 4, dims, generator=generator, dtype=torch.float64) * eigenvalues.sqrt() @ axes.T
    x = (x - x[:count].mean(0)).float()
    return Splits(*x.split([count, count // 8, count // 4 - count // 8]))


def covariance(eigenvalues: Tensor) -> Tensor:
    """Of what `gaussian_data` draws from, [D, D]."""
    axes = _axes(len(eigenvalues), torch.Generator().manual_seed(0))
    return axes * eigenvalues @ axes.T


def _axes(dims: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64)).Q


class LinearVAE(nn.Module):
    """Linear encoder and decoder without biases (the data have mean 0), one posterior variance per latent."""

    def __init__(self, dims: int, latents: int, scale: float) -> None:
        """`scale`: the data's, so that the weights are about 1, whence Adam's steps of one size suit them."""
        super().__init__()
        self.scale = scale
        self.encoder = nn.Linear(dims, latents, bias=False)
        self.decoder = nn.Linear(latents, dims, bias=False)
        self.logvar = nn.Parameter(torch.zeros(latents))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = self.encoder(x / self.scale)
        return mu, self.logvar.expand_as(mu)

    def decode(self, z: Tensor) -> tuple[Tensor, None]:
        return self.scale * self.decoder(z), None

    def forward(self, x: Tensor) -> VAEOutput:
        mu, logvar = self.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return VAEOutput(self.decode(z)[0], mu, logvar, None)

    @torch.no_grad()
    def legs(self, covariance: Tensor, variance: float) -> tuple[float, float]:
        """KL(q(z) ‖ p(z)) and E KL(q(x|z) ‖ p(x|z)) of these weights on Gaussian data of mean 0, exactly.

        Their sum is rate + distortion − H, with `variance` for σ². All is jointly Gaussian: q(z) has the covariance C
        and q(x|z) the mean Az and a covariance P that depends on no z.
        """
        encoder, decoder = self.encoder.weight.double() / self.scale, self.decoder.weight.double() * self.scale
        c = encoder @ covariance @ encoder.T + self.logvar.double().exp().diag()
        a = torch.linalg.solve(c, encoder @ covariance).T
        p = covariance - a @ c @ a.T
        prior = 0.5 * float(c.trace() - c.logdet()) - 0.5 * len(c)
        errors = float(p.trace() + ((a - decoder) @ c @ (a - decoder).T).trace()) / variance
        return prior, 0.5 * (errors + len(p) * (math.log(variance) - 1) - float(p.logdet()))
