"""The models of phase_diagram.py: data of known entropy, and how far a model is from it, in two legs.

With H the entropy of the data, H − D <= I <= R, and what is left of R + D − H has two parts (Alemi et al., ICML 2018,
arXiv:1711.00464), both in nats and neither negative:

    R + D − H  =  KL(q(z) ‖ p(z))  +  E_q(z) KL(q(x|z) ‖ p(x|z))
                  the prior's leg: R − I     the decoder's leg: D − (H − I)
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_elbo import ELBO, decoupled_elbo, log_aggregate_posterior

from . import linear
from .data import Splits, load
from .mlp import MLPVAE
from .objective import VAEObjective, make_criterion
from .sweep import Run
from .training import EVAL_SEED, Trainer

LATENTS = 5  # of the linear VAEs
SPECTRA = {  # of the Gaussian data
    "geometric": 80 * 0.5 ** torch.arange(12, dtype=torch.float64),
    "low rank": torch.tensor([20, 10, 5, 2.5, 1.25, *[0.05] * 15], dtype=torch.float64),
}
LINEAR = {"count": 16384, "batch_size": 512, "lr": 0.1, "draws": 100_000}
IMAGES, NOISE = 64, 0.25  # distinct images, and the standard deviation of the noise on each of their pixels
HIDDEN = {"affine": (), "MLP": (128, 128)}  # layers of the encoder and of the decoder
PIXELS = {"copies": 64, "batch_size": 128, "lr": 3e-3, "latent_dim": 8, "draws": 128}


class Excess(NamedTuple):
    """Means over draws from the data. `gap` is rate + distortion − H, the entropy's part of its noise taken out."""

    rate: float
    distortion: float
    sigma: float
    gap: float
    gap_error: float  # standard error
    z: Tensor
    mu: Tensor
    logvar: Tensor


@torch.no_grad()
def excess(objective: VAEObjective, x: Tensor, log_density: Tensor) -> Excess:
    """x are draws from the data, of the true log density `log_density`; σ is that of training.

    H = −E log q(x), so that the mean of rate_i + distortion_i + log q(x_i) is the gap. An x that is likely or not adds
    to both, and cancels.
    """
    objective.eval()
    device = next(objective.parameters()).device
    x = x.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(EVAL_SEED)
        mu, logvar = objective.model.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    recon = objective.mean(z)
    sigma = float(objective.criterion(recon, x, mu, logvar).sigma)
    elbo = decoupled_elbo(recon, x, mu, logvar, sigma=sigma, reduction="none")
    each = elbo.loss.double().cpu() + log_density
    error = float(each.std() / math.sqrt(len(x)))
    return Excess(
        float(elbo.rate.mean()), float(elbo.distortion.mean()), sigma, float(each.mean()), error, z, mu, logvar
    )


def prior_leg(z: Tensor, mu: Tensor, logvar: Tensor, others: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Bounds of KL(q(z) ‖ p(z)) in nats, from below and from above, of z_i drawn from component i of (mu, logvar).

    Both are the mean of log q̂(z) − log p(z). With a q̂ of `others`, the posteriors of other draws of x, log q̂ is too
    small, by Jensen's inequality. With a q̂ of the posteriors that the z were drawn from it is −H(q̂), and the entropy of
    an estimate is too small.
    """
    log_prior = -0.5 * (z.square() + math.log(2 * math.pi)).double().sum(1)
    below, _ = log_aggregate_posterior(z, *others, own=False)
    above, _ = log_aggregate_posterior(z, mu, logvar)
    return float((below - log_prior).mean()), float((above - log_prior).mean())


def linear_run(args: argparse.Namespace, spectrum: str, *, beta: float, seed: int) -> Run:
    """A linear VAE on Gaussian data, whose legs are known of any weights."""
    eigenvalues, covariance = SPECTRA[spectrum], linear.covariance(SPECTRA[spectrum])
    settings = {"part": spectrum, "model": "linear", "beta": beta, "seed": seed, "linear_epochs": args.linear_epochs}

    def build(checkpoint: Path, settings: dict[str, Any]) -> Trainer:
        torch.manual_seed(seed)
        model = linear.LinearVAE(len(eigenvalues), LATENTS, float(eigenvalues.mean().sqrt()))
        data = linear.gaussian_data(eigenvalues, LINEAR["count"])
        return _trainer(args, VAEObjective(model, make_criterion("optimal", beta, channels=1)), data, LINEAR,
                        args.linear_epochs, checkpoint, settings)  # fmt: skip

    def measure(trainer: Trainer) -> dict[str, Any]:
        normal = torch.distributions.MultivariateNormal(torch.zeros(len(covariance)).double(), covariance)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(EVAL_SEED)
            x = normal.sample((LINEAR["draws"],))
        found = excess(trainer.objective, x.float(), normal.log_prob(x))
        prior, decoder = trainer.objective.model.cpu().legs(covariance, found.sigma**2)
        return _row(found, float(normal.entropy()), (prior, prior), (decoder, decoder))

    return Run(f"{spectrum.replace(' ', '-')}-beta{beta:g}-seed{seed}", settings, build, measure)


def noisy(x: Tensor) -> Tensor:
    return x + NOISE * torch.randn_like(x)


class NoisyObjective(VAEObjective):
    """Each time that it sees an image there is other noise on it: the data are a density, and cannot be learned off."""

    def forward(self, x: Tensor) -> ELBO:
        return super().forward(noisy(x))


def distinct_images() -> Tensor:
    """IMAGES of the 8×8 digits, [N, 64], each the farthest from all before: noise seldom makes one of another."""
    pool = load("digits").train.flatten(1)
    chosen, nearest = [0], torch.full((len(pool),), math.inf)
    for _ in range(IMAGES - 1):
        nearest = torch.minimum(nearest, (pool - pool[chosen[-1]]).square().sum(1))
        chosen.append(int(nearest.argmax()))
    return pool[chosen]


def images_entropy(images: Tensor) -> float:
    """H of one of them, each as likely, under the noise, where that leaves no doubt which one it was."""
    return images.shape[1] / 2 * math.log(2 * math.pi * math.e * NOISE**2) + math.log(len(images))


def images_spectrum(images: Tensor) -> Tensor:
    """Of the noisy images: an affine VAE knows no more of any data than their covariance."""
    return linear.spectrum(images) + NOISE**2


def images_log_density(x: Tensor, images: Tensor) -> Tensor:
    squares = torch.cdist(x.double(), images.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    constant = images.shape[1] / 2 * math.log(2 * math.pi * NOISE**2) + math.log(len(images))
    return torch.logsumexp(-squares / (2 * NOISE**2), 1) - constant


def images_run(args: argparse.Namespace, images: Tensor, model: str, *, beta: float, seed: int) -> Run:
    """A VAE of the noisy images. Its prior's leg has bounds, which are close where it hardly encodes the noise."""
    settings = {"part": "images", "model": model, "beta": beta, "seed": seed, "image_epochs": args.image_epochs}

    def build(checkpoint: Path, settings: dict[str, Any]) -> Trainer:
        torch.manual_seed(seed)
        vae = MLPVAE(images.shape[1], PIXELS["latent_dim"], HIDDEN[model])
        data = Splits(images.repeat(PIXELS["copies"], 1), images, images)
        return _trainer(args, NoisyObjective(vae, make_criterion("optimal", beta, channels=1)), data, PIXELS,
                        args.image_epochs, checkpoint, settings)  # fmt: skip

    @torch.no_grad()
    def measure(trainer: Trainer) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(EVAL_SEED)
            x, others = noisy(images.repeat(PIXELS["draws"], 1)), noisy(images.repeat(PIXELS["draws"], 1))
        found = excess(trainer.objective, x, images_log_density(x, images))
        others = trainer.objective.model.encode(others.to(trainer.device))
        prior = prior_leg(found.z, found.mu, found.logvar, others)
        return _row(found, images_entropy(images), prior, (found.gap - prior[1], found.gap - prior[0]))

    return Run(f"images-{model}-beta{beta:g}-seed{seed}", settings, build, measure)


def _row(found: Excess, entropy: float, prior: tuple[float, float], decoder: tuple[float, float]) -> dict[str, Any]:
    """The numbers of a model; of each leg the bounds, which are one where the leg is known."""
    return {
        "entropy": entropy, "rate": found.rate, "distortion": found.distortion, "sigma": found.sigma,
        "gap": found.gap, "gap_error": found.gap_error,
        "prior_low": prior[0], "prior_high": prior[1], "decoder_low": decoder[0], "decoder_high": decoder[1],
    }  # fmt: skip


def _trainer(
    args: argparse.Namespace,
    objective: VAEObjective,
    data: Splits,
    sizes: dict[str, Any],
    epochs: int,
    checkpoint: Path,
    settings: dict[str, Any],
) -> Trainer:
    return Trainer(
        objective, data, epochs=epochs, batch_size=sizes["batch_size"], lr=sizes["lr"], seed=settings["seed"],
        device=args.device, checkpoint=checkpoint, settings=settings, weight_decay=0.0,
    )  # fmt: skip
