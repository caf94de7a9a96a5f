"""Ways to draw the z that a VAE decodes to samples, and how good they are.

    prior          N(0, I)
    mixture        a mixture of Gaussians with full covariances, fitted to q(z)          RAE (Ghosh et al., ICLR 2020)
    second-stage   a VAE of z, one for each β                                            common/second_stage.py
    conditioned    one VAE of z for every β, which is told β
    recursion-1    N(0, I) at the largest β, decoded, encoded at the β in question       a model that is told β only
    recursion-T    the same in T steps, log-evenly spaced between the two β
    posteriors     z ~ q(z|x) of training images: the ceiling

q(z) is the mixture of all images' posteriors, from which one z is drawn for each image. Samples are decoder means,
without σ, also those that are encoded again.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from . import latents
from .beta_input import BetaInputObjective
from .beta_models import ConditionedConvVAE
from .data import Images
from .metrics import Features, features_of, frechet_distance
from .mmd import mmd
from .objective import VAEObjective

COMPONENTS = 10
SAMPLES = 2000  # of every row alike, and of the training images that stand beside them
ROWS = {
    "prior": "N(0, I)",
    "mixture": f"mixture of {COMPONENTS} Gaussians",
    "second-stage": "second-stage VAE",
    "conditioned": "one second stage, told β",
    "recursion-1": "from the largest β, re-encoded once",
    "posteriors": "training posteriors (ceiling)",
}


class AtBeta(nn.Module):
    """A VAE that is told β, at one of them: it encodes and decodes as a VAE of that β does."""

    n: Tensor

    def __init__(self, objective: BetaInputObjective, beta: float) -> None:
        super().__init__()
        assert isinstance(objective.model, ConditionedConvVAE)
        self.model, self.latent_dim = objective.model, objective.model.vae.latent_dim
        with torch.no_grad():
            at = torch.tensor([beta], device=next(objective.parameters()).device)
            self.register_buffer("n", objective.told(at, objective.log_sigma(at)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(x, self.n.expand(len(x)))

    def decode(self, z: Tensor) -> tuple[Tensor, None]:
        return self.model.decode(z, self.n.expand(len(z))), None


def at(objective: nn.Module, beta: float) -> nn.Module:
    """The VAE of either kind at this β, for the functions of common/latents.py."""
    if isinstance(objective, BetaInputObjective):
        return AtBeta(objective, beta).eval()
    assert isinstance(objective, VAEObjective)
    return objective.model.eval()


def decode(model: nn.Module, z: Tensor) -> Tensor:
    return latents.decode(model, z).clamp(0, 1)


def mixture(z: Tensor, count: int, seed: int = 0) -> Tensor:
    """`count` samples of a mixture of COMPONENTS Gaussians with full covariances that is fitted to z."""
    fitted = GaussianMixture(min(COMPONENTS, len(z)), random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit(z.double().numpy())
    samples, _ = fitted.sample(count)
    return torch.from_numpy(samples).to(z.dtype)


def recursion(
    model_at: Callable[[float], nn.Module], start: float, end: float, steps: int, count: int, latent_dim: int,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """z at β = `end`: from N(0, I) at `start`, decoded and encoded again at the next β, `steps` times."""
    z = latents.prior(count, latent_dim, seed)
    path = np.geomspace(start, end, steps + 1).tolist()
    for step, (here, there) in enumerate(itertools.pairwise(path)):
        images = decode(model_at(here), z)
        z = latents.draw(*latents.encode(model_at(there), images), seed=seed + 1 + step)
    return z


class HeldOut:
    """The images that no model was trained on, validation and test, as what samples are compared with.

    network: of the Fréchet distance's features; without one there is no such distance. All rows have `count` images,
    since the distance depends on how many there are.
    """

    def __init__(self, images: Images, network: Features | None) -> None:
        self.images, self.network = torch.cat([images.val, images.test]), network
        self.count = min(SAMPLES, len(images.train))
        self.features = None if network is None else features_of(network, self.images)

    def frechet(self, images: Tensor) -> float | None:
        if self.network is None or self.features is None:
            return None
        return frechet_distance(features_of(self.network, images), self.features)

    def measure(self, model: nn.Module, rows: dict[str, Tensor], seed: int = 0) -> list[dict[str, Any]]:
        """Of each row's z: MMD² from q(z) of these images, and the distance of what the model decodes from them."""
        q = latents.draw(*latents.encode(model, self.images), seed=seed)
        return [
            {"row": name, "frechet": self.frechet(decode(model, z)), "mmd": mmd(z, q)} for name, z in rows.items()
        ]


def name_of(row: str) -> str:
    """As it is printed."""
    return ROWS.get(row) or f"the same in {row.partition('-')[2]} steps"


def in_order(rows: Iterable[str]) -> list[str]:
    """Without repetition, the ceiling last."""
    return sorted(dict.fromkeys(rows), key=lambda row: row == "posteriors")
