"""One trained VAE, read at several σ: what its squared error costs in nats, ½log 2π included.

σ is a number beside the model, and a squared error says nothing of it: distortion = SSE/(2σ²) + D/2·log(2πσ²). Training
on SSE + β·rate leaves three ways to choose it (arXiv 2409.09361 draws them):

    half      σ² = ½       SSE + D/2·log π                   what "squared error" literally is
    beta      σ² = β/2     SSE/β + D/2·log(πβ)               the ELBO of which SSE + β·rate is β times, up to a constant
    optimal   σ² = SSE/D   D/2·(log(2π·SSE/D) + 1)           the σ under which the data are likeliest, no σ being better
    trained   σ² = the running average over training         what a decoupled model has before it sees the data
    image     σ² = each image's own MSE                      no likelihood: σ sees x

`optimal` takes the mean SSE of the split that is read, one σ for all of it: with hindsight, but one density, so that
distortion + rate bounds its −log p(x). Only `image` is no bound.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_elbo import DecoupledELBO

from .training import Trainer

HALF = math.sqrt(0.5)  # with this σ the loss is SSE + β·rate, up to the constant D/2·log π


def measure(trainer: Trainer, images: Tensor, *, draws: int) -> dict[str, float]:
    """Measures one split, with `draws` latents for each of its members: mean rate, squared error, and the distortions
    that cannot be had from these."""
    dims = images[0].numel()
    images = torch.cat([images] * draws)
    trained = trainer.evaluate(images)
    half = _evaluate(trainer, images, DecoupledELBO(sigma=HALF))
    image = _evaluate(trainer, images, DecoupledELBO(sigma="optimal-per-image"))
    return {
        "rate": trained["rate"],
        "sse": half["distortion"] - dims / 2 * math.log(math.pi),
        "sigma_trained": trained["sigma"],
        "trained": trained["distortion"],
        "image": image["distortion"],
        "sigma_image": image["sigma"],
    }


def _evaluate(trainer: Trainer, images: Tensor, criterion: DecoupledELBO) -> dict[str, float]:
    """Does what Trainer.evaluate does, with the same latents, by another loss."""
    own, trainer.objective.criterion = trainer.objective.criterion, criterion
    try:
        return trainer.evaluate(images)
    finally:
        trainer.objective.criterion = own


def distortion(sse: float, dims: int, variance: float) -> float:
    return sse / (2 * variance) + dims / 2 * math.log(2 * math.pi * variance)


def readings(measured: dict[str, Any], dims: int, beta: float, *, squared_error: bool) -> list[dict[str, Any]]:
    """Rows: one for each way to read the model. `squared_error`: it was trained on SSE + beta·rate."""
    sse = measured["sse"]
    variances = {"optimal": sse / dims}
    if squared_error:
        variances |= {"half": 0.5, "beta": beta / 2}
    rows = [
        {"reading": name, "sigma": math.sqrt(variance), "distortion": distortion(sse, dims, variance), "bound": "yes"}
        for name, variance in variances.items()
    ]
    if not squared_error:
        rows.append(_row(measured, "trained", "yes"))
    return [*rows, _row(measured, "image", "no: sigma sees x")]


def _row(measured: dict[str, Any], reading: str, bound: str) -> dict[str, Any]:
    sigma, nats = measured[f"sigma_{reading}"], measured[reading]
    return {"reading": reading, "sigma": sigma, "distortion": nats, "bound": bound}
