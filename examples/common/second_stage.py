"""The second stage of a two-stage VAE (Dai and Wipf, ICLR 2019): a VAE of another VAE's latents, to sample them by.

Its data are the posteriors q(z|x) of the training images, a z being drawn anew in each step. Its own σ is the closed
form of the batch. Told β, one second stage serves all β of a first stage that is told β. Then one σ for a batch would
be that of a mixture, so σ comes from a small network of β instead (common/beta_input.py says why).

β of its rate may grow from 0 to 1 in the first part of training, which others report as the cure where u ends up saying
nothing of z. It did not happen here, and a warm-up did harm (examples/README.md has the numbers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_elbo import ELBO, DecoupledELBO

from . import latents
from .beta_input import LogSigma, sigma_elbo
from .conditioning import BetaRange
from .data import Splits
from .mlp import mlp
from .objective import MOMENTUM
from .training import Trainer

HIDDEN = (256, 256)
BATCH_SIZE, LR = 128, 2e-3


class SecondStageVAE(nn.Module):
    """z [B, K] and n [B], which tells it β, to u [B, K] and back."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.encoder = mlp(latent_dim + 1, *HIDDEN, 2 * latent_dim)
        self.decoder = mlp(latent_dim + 1, *HIDDEN, latent_dim)

    def encode(self, z: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(torch.cat([z, n[:, None]], 1)).chunk(2, dim=1)
        return mu, logvar

    def decode(self, u: Tensor, n: Tensor) -> Tensor:
        return self.decoder(torch.cat([u, n[:, None]], 1))


class SecondStage(nn.Module):
    """Posteriors of B images at each of J `betas`, [B, J, 2K] (mu beside logvar) -> ELBO of one z for each image.

    With several β, a sample has one of them, drawn anew in each step, and in evaluation the next one in turn.

    warmup: steps until β of the second stage's own rate is 1.
    """

    told: Tensor  # [J]
    steps: Tensor

    def __init__(self, latent_dim: int, betas: Sequence[float], span: BetaRange, warmup: int) -> None:
        super().__init__()
        self.model, self.span, self.warmup = SecondStageVAE(latent_dim), span, warmup
        self.register_buffer("told", span.standardise(torch.tensor(betas).log()), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.criterion = DecoupledELBO(momentum=MOMENTUM) if len(betas) == 1 else None
        self.log_sigma_of = None if len(betas) == 1 else LogSigma(0.0)

    def forward(self, posteriors: Tensor) -> ELBO:
        count, choices, _ = posteriors.shape
        if self.training:
            choice = torch.randint(choices, (count,), device=posteriors.device)
        else:
            choice = torch.arange(count, device=posteriors.device) % choices
        z_mu, z_logvar = posteriors[torch.arange(count, device=posteriors.device), choice].chunk(2, dim=1)
        z = z_mu + torch.exp(0.5 * z_logvar) * torch.randn_like(z_mu)
        n = self.told[choice]
        mu, logvar = self.model.encode(z, n)
        recon = self.model.decode(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu), n)
        beta = self._beta()
        if self.criterion is not None:
            self.criterion.beta = beta
            return self.criterion(recon, z, mu, logvar)
        assert self.log_sigma_of is not None
        elbo = sigma_elbo("network", recon, z, mu, logvar, torch.full_like(n, beta), self.log_sigma_of(n))
        assert elbo.sigma is not None
        return elbo._replace(sigma=elbo.sigma.log().mean().exp())

    def _beta(self) -> float:
        if not self.training:
            return 1.0
        self.steps += 1
        return min(1.0, int(self.steps) / max(1, self.warmup))

    @torch.no_grad()
    def sample(self, beta: float, count: int, seed: int = 0) -> Tensor:
        """z [count, K] of p(z): u ~ N(0, I), then z ~ N(decoder's mean, σ²), since z is noisy itself."""
        n = self.span.standardise(torch.full((count,), beta).log()).to(self.told)
        u = latents.prior(count, self.model.latent_dim, seed)
        noise = latents.prior(count, self.model.latent_dim, seed + 1)
        mean = self.model.eval().decode(u.to(n.device), n)
        return mean.cpu() + self.sigma(beta) * noise

    @torch.no_grad()
    def sigma(self, beta: float) -> float:
        if self.criterion is not None:
            return math.sqrt(float(self.criterion.running_var))
        assert self.log_sigma_of is not None
        return float(self.log_sigma_of(self.span.standardise(torch.tensor([beta]).log()).to(self.told)).exp())

    @torch.no_grad()
    def usage(self, beta: float, z: Tensor) -> dict[str, float]:
        """The second stage's rate at these z, in nats, and how many of its latents are active: 0 if it collapsed."""
        n = self.span.standardise(torch.full((len(z),), beta).log()).to(self.told)
        mu, logvar = (part.cpu() for part in self.model.eval().encode(z.to(n.device), n))
        return {
            "stage_sigma": self.sigma(beta),
            "stage_rate": float(latents.rates(mu, logvar).sum()),
            "stage_active": int(latents.active(logvar).sum()),
        }


def posteriors(models: Sequence[nn.Module], data: Tensor) -> Tensor:
    """[N, J, 2K] of a first stage at J β."""
    return torch.stack([torch.cat(latents.encode(model, data), 1) for model in models], 1)


def build(
    models: Sequence[nn.Module], betas: Sequence[float], span: BetaRange, data: Splits, *, epochs: int, warmup: float,
    device: torch.device, checkpoint: Path, settings: dict[str, Any],
) -> Trainer:  # fmt: skip
    """`models`: the first stage at each of `betas`. `warmup`: as a share of the training."""
    splits = Splits(*(posteriors(models, part) for part in (data.train, data.val, data.test)))
    torch.manual_seed(settings["seed"])
    steps = epochs * max(1, len(data.train) // BATCH_SIZE)
    return Trainer(
        SecondStage(splits.train.shape[2] // 2, betas, span, round(warmup * steps)), splits, epochs=epochs,
        batch_size=BATCH_SIZE, lr=LR, seed=settings["seed"], device=device, checkpoint=checkpoint, settings=settings,
    )  # fmt: skip
