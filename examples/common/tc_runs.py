"""The VAEs of kl_decomposition.py and disentanglement.py, and the three parts of their KL.

coupled: SSE + β·rate, that is a constant σ = √½ and β on the whole rate; decoupled: the batch's optimal σ and β on the
whole rate; tc: the batch's optimal σ and β on the total correlation alone (β-TCVAE).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_elbo import ELBO, kl_decomposition

from .beta_input import BetaInputObjective
from .beta_models import ConditionedMLPVAE
from .conditioning import BetaRange
from .data import Images, Splits
from .mlp import MLPVAE
from .objective import VAEObjective, make_criterion
from .readings import HALF
from .sweep import Run
from .training import Trainer

FAMILIES = {
    "coupled": "β on the rate, σ constant",
    "decoupled": "β on the rate, σ optimal",
    "tc": "β on TC alone, σ optimal",
}
COLOURS = {"coupled": "#777777", "decoupled": "#0072B2", "tc": "#D55E00"}
SHAPES_BETAS = {"coupled": (0.01, 0.06, 0.3, 1), "decoupled": (0.5, 2, 8, 16), "tc": (2, 4, 16, 64)}
SHAPES_EPOCHS, QUICK_SHAPES_EPOCHS = 30, 10
HIDDEN = (256, 256)
BATCH_SIZE, LR = 256, 4e-3  # TC is estimated the better the larger the batch is


class TCVAEObjective(VAEObjective):
    """distortion + rate + (β − 1)·TC. The rate is in closed form; TC alone is estimated, from the batch's mixture.

    In evaluation the loss is distortion + rate, which is what bounds −log p(x).
    """

    def __init__(self, model: MLPVAE, criterion: nn.Module, beta: float, dataset_size: int) -> None:
        super().__init__(model, criterion)
        self.beta, self.dataset_size = beta, dataset_size

    def forward(self, x: Tensor) -> ELBO:
        mu, logvar = self.model.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        elbo: ELBO = self.criterion(self.model.decode(z)[0], x, mu, logvar)
        loss = elbo.loss
        if self.training:
            terms = kl_decomposition(z, mu, logvar, dataset_size=self.dataset_size)
            loss = loss + (self.beta - 1) * terms.total_correlation
        return elbo._replace(loss=loss, sigma=elbo.sigma.log().mean().exp())


def make_objective(family: str, beta: float, data: Splits, latent_dim: int) -> VAEObjective:
    model = MLPVAE(data.dims, latent_dim, HIDDEN)
    if family == "tc":
        return TCVAEObjective(model, make_criterion("optimal", 1.0, channels=1), beta, len(data.train))
    sigma = "optimal" if family == "decoupled" else repr(HALF)
    return VAEObjective(model, make_criterion(sigma, beta, channels=1))


def make_told(betas: Sequence[float], images: Images, data: Splits, latent_dim: int) -> BetaInputObjective:
    """One model for all these β, as the decoupled ones but that it is told β and that σ is a network's."""
    model = ConditionedMLPVAE(data.dims, latent_dim, HIDDEN)
    return BetaInputObjective(model, BetaRange(betas[0] / 2, 2 * betas[-1]), log_std=images.log_std)


def make_run(
    args: argparse.Namespace,
    name: str,
    images: Images,
    family: str,
    beta: float | Sequence[float],
    seed: int,
    epochs: int,
    measure: Callable[[Trainer], dict[str, Any]],
) -> Run:
    """One model of the flattened images: of one β and a family of FAMILIES, or told one of several. `args` has
    latent_dim and device; `name` is that of the data."""
    data = Splits(*(part.flatten(1) for part in (images.train, images.val, images.test)))
    settings = {
        "data": name, "data_shape": [len(images.train), *images.shape], "family": family,
        "beta": beta if isinstance(beta, int | float) else list(beta), "seed": seed, "latent_dim": args.latent_dim,
        "epochs": epochs,
    }  # fmt: skip

    def build(checkpoint: Path, settings: dict[str, Any]) -> Trainer:
        torch.manual_seed(seed)
        if isinstance(beta, int | float):
            objective: nn.Module = make_objective(family, beta, data, args.latent_dim)
        else:
            objective = make_told(beta, images, data, args.latent_dim)
        return Trainer(
            objective, data, epochs=epochs, batch_size=BATCH_SIZE, lr=LR, seed=seed, device=args.device,
            checkpoint=checkpoint, settings=settings,
        )  # fmt: skip

    which = f"beta{beta:g}" if isinstance(beta, int | float) else "told"
    return Run(f"{name}-{family}-{which}-seed{seed}", settings, build, measure)
