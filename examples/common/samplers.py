"""Ways to draw the z that a VAE decodes to samples, and how good they are.

    prior          N(0, I)
    mixture        a mixture of Gaussians with full covariances, fitted to q(z)          RAE (Ghosh et al., ICLR 2020)
    second-stage   a VAE of z, one for each β                                            common/second_stage.py
    conditioned    one VAE of z for every β, which is told β
    recursion-1    N(0, I) at a large β, decoded, encoded at the β in question            a model that is told β only
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
from .data import Images
from .mmd import mmd
from .ruler import Ruler
from .training import EVAL_SEED

COMPONENTS = 10
ROWS = {
    "prior": "N(0, I)",
    "mixture": f"mixture of {COMPONENTS} Gaussians",
    "second-stage": "second-stage VAE",
    "conditioned": "one second stage, told β",
    "recursion-1": "from a large β, re-encoded once",
    "posteriors": "training posteriors (ceiling)",
}


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
        images = latents.images_of(model_at(here), z)
        z = latents.draw(*latents.encode(model_at(there), images), seed=seed + 1 + step)
    return z


def measure(model: nn.Module, rows: dict[str, Tensor], images: Images, ruler: Ruler) -> list[dict[str, Any]]:
    """Of each row's z: the Fréchet distance of what the model decodes from them, and MMD² from q(z) of the validation
    and the test images, which no model was trained on."""
    q = latents.draw(*latents.encode(model, torch.cat([images.val, images.test])), EVAL_SEED)
    return [{"row": name, "frechet": ruler(latents.images_of(model, z)), "mmd": mmd(z, q)} for name, z in rows.items()]


def name_of(row: str) -> str:
    """As it is printed."""
    return ROWS.get(row) or f"the same in {row.partition('-')[2]} steps"


def in_order(rows: Iterable[str]) -> list[str]:
    """Without repetition, the ceiling last."""
    return sorted(dict.fromkeys(rows), key=lambda row: row == "posteriors")
