"""One convolutional VAE for every β beside one VAE for each: what is trained, and how it is read.

    separate           one VAE a β                                   as rd_curve.py has them
    beta-input         one VAE that is told β, as many epochs as one of them

each of them decoupled, and under squared error + β'·rate. Models are compared by their own β-loss on the test split: at
the σ(β) of the training error, distortion + β·rate; SSE + β'·rate. A distortion alone says nothing, since a model may
pay for it by its rate.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import readings
from .at_beta import at
from .beta_input import BetaInputObjective, errors, measure
from .beta_models import CONDITIONING, ConditionedConvVAE
from .conditioning import BetaRange
from .data import Images
from .objective import make_objective
from .ruler import Ruler, from_prior
from .sweep import Run
from .training import Trainer

FAMILIES = ("decoupled", "squared error")
BATCH_SIZE, LR, DRAWS = 64, 3e-3, 4


def span(betas: Sequence[float]) -> BetaRange:
    """What a β-input model is trained for: half a step of the grid beyond both ends."""
    beyond = math.sqrt(betas[1] / betas[0])
    return BetaRange(betas[0] / beyond, betas[-1] * beyond)


def sweep(args: argparse.Namespace, images: Images, betas: dict[str, list[float]], ruler: Ruler) -> Iterator[Run]:
    names = ("data", "image_size", "grey", "epochs", "latent_dim", "width")
    settings = {name: getattr(args, name) for name in names}
    settings["data_shape"] = list(images.train.shape)  # notices a folder whose content has changed
    for seed in range(args.seed, args.seed + args.repeats):
        for family in FAMILIES:
            own = settings | {"family": family, "seed": seed, "betas": betas[family]}
            yield Run(
                name=f"beta-input-{family.replace(' ', '-')}-seed{seed}",
                settings=own | {"kind": "beta-input", "conditioning": args.conditioning, "sigma": args.sigma},
                build=functools.partial(build_beta_input, args, images),
                measure=functools.partial(read_beta_input, images=images, betas=betas[family], ruler=ruler),
            )
            for beta in betas[family]:
                yield Run(
                    name=f"separate-{family.replace(' ', '-')}-beta{beta:g}-seed{seed}",
                    settings=own | {"kind": "separate", "betas": [beta]},
                    build=functools.partial(build_separate, args, images),
                    measure=functools.partial(read_separate, images=images, beta=beta, ruler=ruler),
                )


def build_beta_input(args: argparse.Namespace, images: Images, checkpoint: Path, settings: dict[str, Any]) -> Trainer:
    torch.manual_seed(settings["seed"])
    coupled = settings["family"] == "squared error"
    condition = CONDITIONING[args.conditioning].told
    objective = BetaInputObjective(
        ConditionedConvVAE(images.shape, args.latent_dim, args.width, args.conditioning),
        span(settings["betas"]), sigma="half" if coupled else args.sigma,
        condition="log-beta" if coupled or args.sigma != "network" else condition, log_std=images.log_std,
    )  # fmt: skip
    return _trainer(args, objective, images, checkpoint, settings)


def build_separate(args: argparse.Namespace, images: Images, checkpoint: Path, settings: dict[str, Any]) -> Trainer:
    torch.manual_seed(settings["seed"])
    sigma = "optimal" if settings["family"] == "decoupled" else repr(readings.HALF)
    objective = make_objective(
        images.shape, sigma, settings["betas"][0], latent_dim=args.latent_dim, width=args.width
    )  # fmt: skip
    return _trainer(args, objective, images, checkpoint, settings)


def _trainer(
    args: argparse.Namespace, objective: torch.nn.Module, images: Images, checkpoint: Path, settings: dict[str, Any]
) -> Trainer:
    return Trainer(
        objective, images, epochs=args.epochs, batch_size=BATCH_SIZE, lr=LR, seed=settings["seed"],
        device=args.device, checkpoint=checkpoint, settings=settings,
    )  # fmt: skip


def read_beta_input(trainer: Trainer, images: Images, betas: Sequence[float], ruler: Ruler) -> dict[str, Any]:
    """At each β: σ from the training split, then rate and error of the test split, and what samples look like."""
    objective = trainer.objective
    assert isinstance(objective, BetaInputObjective)
    rows = []
    with torch.random.fork_rng():
        for row in measure(objective, images.train, betas, draws=1, batch_size=256):
            log_sigma = torch.tensor([math.log(row["sigma_error"])], device=trainer.device)
            rate, sse = errors(objective, images.test, row["beta"], log_sigma, DRAWS, 256)
            network = {key: row[key] for key in ("sigma_network", "error_network") if key in row}
            frechet = ruler(from_prior(at(objective, row["beta"], row["sigma_error"]), ruler.count))
            found = {"beta": row["beta"], "rate": rate, "sse": sse, "sigma": row["sigma_error"], "frechet": frechet}
            rows.append(found | network)
    return {"points": rows}


def read_separate(trainer: Trainer, images: Images, beta: float, ruler: Ruler) -> dict[str, Any]:
    def mean(split: Tensor, draws: int) -> tuple[float, float]:
        found = readings.measure(trainer, split, draws=draws)
        return found["rate"], found["sse"]

    rate, sse = mean(images.test, DRAWS)
    sigma = math.sqrt(mean(images.train, 1)[1] / images.dims)
    found = ruler(from_prior(at(trainer.objective, beta), ruler.count))
    return {"points": [{"beta": beta, "rate": rate, "sse": sse, "sigma": sigma, "frechet": found}]}


def rows_of(models: Sequence[dict[str, Any]], dims: int) -> list[dict[str, Any]]:
    """A row for each model and β, with its β-loss in nats and what a β-input model has above the separate one's.

    SSE + β'·rate becomes nats over 2σ², at the σ of the separate model.
    """
    rows = [
        {"kind": m["kind"], "family": m["family"], "seed": m["seed"], **point} for m in models for point in m["points"]
    ]
    separate = {(r["family"], r["seed"], r["beta"]): r for r in rows if r["kind"] == "separate"}
    for row in rows:
        other = separate[row["family"], row["seed"], row["beta"]]
        row["distortion"] = readings.distortion(row["sse"], dims, row["sigma"] ** 2)
        row["loss"] = _loss(row, other, dims)
        row["separate_rate"] = other["rate"]
        row["excess"] = row["loss"] - _loss(other, other, dims)
    return rows


def spreads(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Of each kind and family with Fréchet distances: over β, the largest mean of the seeds over the smallest."""
    found = {}
    for kind, family in sorted({(row["kind"], row["family"]) for row in rows if row["frechet"] is not None}):
        own = [row for row in rows if (row["kind"], row["family"]) == (kind, family)]
        means = [
            statistics.fmean(row["frechet"] for row in own if row["beta"] == beta) for beta in {r["beta"] for r in own}
        ]
        found[kind, family] = max(means) / min(means)
    return found


def _loss(row: dict[str, Any], other: dict[str, Any], dims: int) -> float:
    if row["family"] == "decoupled":
        return readings.distortion(row["sse"], dims, row["sigma"] ** 2) + row["beta"] * row["rate"]
    return readings.distortion(row["sse"], dims, other["sigma"] ** 2) + row["beta"] * row["rate"] / (
        2 * other["sigma"] ** 2
    )
