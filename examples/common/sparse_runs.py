"""The models of sparse_representation.py: what each is trained on, and what is measured."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import Images, Splits, to_unit
from .latents import active, decode, encode, prior, pruned, used
from .manifolds import curved, parabola
from .mlp import MLPVAE
from .mmd import mmd
from .objective import VAEObjective, make_criterion
from .penalised import PenalisedAutoencoder
from .sweep import Run
from .training import Trainer

DIMS, LATENTS, SUBSPACE = 20, 10, 5  # of the synthetic data, of their models, and of the penalties' subspace
CURVATURE = 0.2
TRAINING = {  # per part: steps, batch size and learning rate
    "images": (1600, 64, 3e-3),
    "rate": (1600, 100, 5e-3),
    "penalty": (2400, 50, 1e-2),
    "parabola": (2400, 50, 3e-3),
}
PARABOLA_NOISE = 0.0025


def image_run(args: argparse.Namespace, images: Images, *, beta: float, sigma: str) -> Run:
    """A VAE of the flattened images, for the number of its active latents."""
    settings = {"part": "images", "data": args.data, "shape": [len(images.train), *images.shape], "beta": beta,
                "sigma_mode": sigma, "seed": args.seed, "latent_dim": args.latent_dim}  # fmt: skip
    splits = Splits(*(to_unit(part).flatten(1) for part in (images.train, images.val, images.test)))

    def objective() -> nn.Module:
        criterion = make_criterion(sigma, beta, channels=1)
        return VAEObjective(MLPVAE(splits.dims, args.latent_dim, (256,)), criterion)

    def measure(trainer: Trainer) -> dict[str, Any]:
        model, test = trainer.objective.model, trainer.images.test
        mu, logvar = encode(model, test)
        numbers = trainer.evaluate(test)
        return {
            "active": int(active(logvar).sum()),
            "mse": float((decode(model, mu) - test).square().mean()),
            **{key: numbers[key] for key in ("sigma", "distortion", "rate")},
        }

    return make_run(args, f"images-{sigma}-{beta:g}", settings, splits, objective, measure)


def pruning_curve(trainer: Trainer) -> list[dict[str, float]]:
    """Latents put to 0 one after the other, the least informative (of the largest posterior variance) first.

    Reconstruction by the mean squared error at the posterior's mean; generation by the MMD in the space of images
    between decoded draws from the prior, with the same latents at 0, and the test images.
    """
    model, images = trainer.objective.model, trainer.images.test
    mu, logvar = encode(model, images)
    z = prior(len(images), mu.shape[1], seed=2)
    order = logvar.exp().mean(0).argsort(descending=True)
    variance = float(images.var(0).sum())
    curve = []
    for count in range(len(order) + 1):
        dropped = order[:count]
        curve.append(
            {
                "pruned": count,
                "mse": float((decode(model, pruned(mu, dropped)) - images).square().mean()),
                "mmd": 1000 * mmd(decode(model, pruned(z, dropped)), images, variance),
            }
        )
    return curve


def rate_run(args: argparse.Namespace, *, intrinsic: int, noise: float) -> Run:
    """A VAE with gamma learned, on a curved manifold with noise: gamma ends near the noise, so that it is swept too."""
    settings = {"part": "rate", "intrinsic": intrinsic, "noise": noise, "seed": args.seed}
    splits = curved(4000, intrinsic=intrinsic, dims=DIMS, noise=noise, curvature=CURVATURE, seed=args.seed)

    def measure(trainer: Trainer) -> dict[str, Any]:
        numbers = trainer.evaluate(trainer.images.test)
        _, logvar = encode(trainer.objective.model, trainer.images.test)
        return {"gamma": numbers["sigma"] ** 2, "rate": numbers["rate"], "active": int(active(logvar).sum())}

    return make_run(args, f"rate-{intrinsic}-{noise:g}", settings, splits, lambda: learned((64,)), measure)


def learned(hidden: tuple[int, ...], dims: int = DIMS, latent_dim: int = LATENTS) -> VAEObjective:
    return VAEObjective(MLPVAE(dims, latent_dim, hidden), make_criterion("learned", 1.0, channels=1))


def penalty_run(args: argparse.Namespace, *, kind: str, weight: float, width: float | None) -> Run:
    """kind: "vae", without weight and width, or "penalty"; both affine, on a subspace without noise."""
    settings = {"part": "penalty", "kind": kind, "weight": weight, "width": width, "seed": args.seed}
    splits = curved(2000, intrinsic=SUBSPACE, dims=DIMS, noise=0.0, curvature=0.0, seed=args.seed)

    def objective() -> nn.Module:
        return learned(()) if kind == "vae" else PenalisedAutoencoder(DIMS, LATENTS, weight, width)

    @torch.no_grad()
    def measure(trainer: Trainer) -> dict[str, Any]:
        x = trainer.images.test
        model = trainer.objective.model if kind == "vae" else trainer.objective
        z = encode(model, x)[0] if kind == "vae" else model.encoder(x)
        variance = float(x.var(0).sum())
        error = float((decode(model, z) - x).square().sum(1).mean())
        return {"error": error / variance, "used": int(used(model, z, variance).sum())}

    return make_run(args, f"penalty-{kind}-{width}-{weight:g}", settings, splits, objective, measure)


def parabola_run(args: argparse.Namespace) -> Run:
    """A VAE of two latents for points beside a curve in the plane: does it see that one is enough?"""
    settings = {"part": "parabola", "noise": PARABOLA_NOISE, "seed": args.seed}
    splits = parabola(2000, noise=PARABOLA_NOISE, seed=args.seed)

    def measure(trainer: Trainer) -> dict[str, Any]:
        _, logvar = encode(trainer.objective.model, trainer.images.test)
        numbers = trainer.evaluate(trainer.images.test)
        return {"gamma": numbers["sigma"] ** 2, "active": int(active(logvar).sum())}

    return make_run(args, "parabola", settings, splits, lambda: learned((64, 64), 2, 2), measure)


def make_run(
    args: argparse.Namespace,
    name: str,
    settings: dict[str, Any],
    splits: Splits,
    objective: Callable[[], nn.Module],
    measure: Callable[[Trainer], dict[str, Any]],
) -> Run:
    steps, batch_size, lr = TRAINING[settings["part"]]
    epochs = math.ceil(steps * args.length / max(1, len(splits.train) // batch_size))

    def build(checkpoint: Path, settings: dict[str, Any]) -> Trainer:
        torch.manual_seed(args.seed)
        return Trainer(
            objective(), splits, epochs=epochs, batch_size=batch_size, lr=lr, seed=args.seed, device=args.device,
            checkpoint=checkpoint, settings=settings,
        )  # fmt: skip

    return Run(name, {**settings, "length": args.length}, build, measure)
