"""A VAE of either kind at one β: the one that is told β, or the one that was trained for it.

Both encode and decode as common/latents.py expects of a VAE.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .beta_input import BetaInputObjective
from .beta_models import ConditionedVAE
from .objective import VAEObjective


class AtBeta(nn.Module):
    """A VAE that is told β, at one of them.

    sigma: σ(β), which a model that is told the level must know; by default its network's.
    """

    n: Tensor

    def __init__(self, objective: BetaInputObjective, beta: float, sigma: float | None = None) -> None:
        super().__init__()
        assert isinstance(objective.model, ConditionedVAE)
        self.model, self.latent_dim = objective.model, objective.model.latent_dim
        device = next(objective.parameters()).device
        with torch.no_grad():
            at = torch.tensor([beta], device=device)
            log_sigma = objective.log_sigma(at) if sigma is None else torch.tensor([sigma], device=device).log()
            self.register_buffer("n", objective.told(at, log_sigma))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(x, self.n.expand(len(x)))

    def decode(self, z: Tensor) -> tuple[Tensor, None]:
        return self.model.decode(z, self.n.expand(len(z))), None


def at(objective: nn.Module, beta: float, sigma: float | None = None) -> nn.Module:
    if isinstance(objective, BetaInputObjective):
        return AtBeta(objective, beta, sigma).eval()
    assert isinstance(objective, VAEObjective)
    return objective.model.eval()
