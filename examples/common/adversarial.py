"""The training of an autoencoder against a discriminator of patches, as latent diffusion has it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_elbo import ELBO

from .latent_models import SCALE, FeatureDistance, LatentAutoencoder, PatchDiscriminator, wide
from .training import Trainer

LR, BETAS = 5e-4, (0.5, 0.9)  # of the discriminator's Adam
MAX_WEIGHT = 1e4


def centred(x: Tensor) -> Tensor:
    """Bytes to [-1, 1]; what is floating lies there already."""
    return x / 127.5 - 1 if x.dtype == torch.uint8 else x


def adaptive_weight(distortion: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The ratio of both gradients' norms at the decoder's last layer, detached.

    With it the discriminator pulls as hard as the likelihood, whatever the units of both. VQGAN and latent diffusion
    have it so (Esser, Rombach, Ommer, CVPR 2021, equation 7).
    """
    of_distortion, of_adversarial = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (distortion, adversarial)
    )
    return (of_distortion / (of_adversarial + 1e-4)).clamp(0, MAX_WEIGHT)


class LatentObjective(nn.Module):
    """Bytes, or floats in [-1, 1], to the ELBO of `loss(recon, x, mu, logvar, p)`, p being the FeatureDistance.

    A loss that `reads_bytes` gets x as it came, others as floats.
    """

    def __init__(self, model: LatentAutoencoder, loss: nn.Module, *, bf16: bool) -> None:
        super().__init__()
        self.model, self.loss, self.bf16 = model, loss, bf16
        self.distance = FeatureDistance(model.last.out_channels // SCALE**2)

    def autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16)

    def elbo(self, x: Tensor) -> tuple[ELBO, Tensor]:
        """And the reconstruction."""
        image = centred(x)
        with self.autocast(x):
            recon, mu, logvar = self.model(image)
            target = x if self.loss.reads_bytes else image
            return self.loss(recon, target, mu, logvar, self.distance(recon, image)), recon

    def forward(self, x: Tensor) -> ELBO:
        return self.elbo(x)[0]


class AdversarialTrainer(Trainer):
    """`Trainer` of a LatentObjective whose reconstructions a PatchDiscriminator judges, by the hinge loss.

    Args:
        gan: weight of the discriminator, beside the adaptive one; 0 does without.
        gan_start: the epoch from which on it takes part, when there is something to judge.
        ema: decay of an average of the weights, which is evaluated in their place; 0 for none.
    """

    objective: LatentObjective

    def __init__(self, objective: LatentObjective, *args: Any, gan: float, gan_start: int, ema: float, **options: Any):
        super().__init__(objective, *args, **options)
        self.gan, self.gan_start = gan, gan_start
        self.discriminator = PatchDiscriminator(self.images.train.shape[1]).to(self.device)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), LR, BETAS)
        self.average = AveragedModel(objective.model, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None

    def batch(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return images if images.dtype == torch.uint8 else 2 * images - 1

    def train_step(self, index: Tensor) -> ELBO:
        elbo = super().train_step(index)
        if self.average is not None:
            self.average.update_parameters(self.objective.model)
        return elbo

    def gradients(self, x: Tensor) -> ELBO:
        elbo, recon = self.objective.elbo(x)
        if self.gan == 0 or self.epoch < self.gan_start:
            elbo.loss.backward()
            return elbo
        self.discriminator.requires_grad_(False)
        with self.objective.autocast(x):
            adversarial = -self.discriminator(recon).mean()
        weight = adaptive_weight(elbo.distortion, adversarial, self.objective.model.last_layer)
        (elbo.loss + self.gan * weight * adversarial).backward()
        self.discriminator.requires_grad_(True)
        self.discriminate(centred(x), recon.detach())
        return elbo

    def discriminate(self, real: Tensor, recon: Tensor) -> None:
        with self.objective.autocast(real):
            on_real, on_recon = self.discriminator(real), self.discriminator(recon)
        self.discriminator_optimizer.zero_grad()
        (0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_recon).mean())).backward()
        self.discriminator_optimizer.step()

    @property
    def model(self) -> LatentAutoencoder:
        """What is evaluated."""
        return self.objective.model if self.average is None else self.average.module

    def evaluate(self, images: Tensor) -> dict[str, float]:
        """The ELBO, and three errors at the posterior's mean, which no scale has a part in."""
        trained, self.objective.model = self.objective.model, self.model
        try:
            return {**super().evaluate(images), **self.errors(images)}
        finally:
            self.objective.model = trained

    @torch.no_grad()
    def errors(self, images: Tensor) -> dict[str, float]:
        chunks = [(centred(x), self.reconstruct(x)) for x in map(self.batch, images.split(self.batch_size))]
        absolute, square, features = (
            torch.cat([error(recon, x) for x, recon in chunks]).mean().item()
            for error in (_mean(torch.abs), _mean(torch.square), self.objective.distance)
        )
        return {"mae": absolute, "mse": square, "features": features}

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """In [-1, 1], at the posterior's mean, of what `batch` gives."""
        with self.objective.autocast(x):
            return wide(self.model.decode(self.model.encode(centred(x))[0])).clamp(-1, 1)

    def state_dict(self) -> dict[str, Any]:
        own = {"discriminator": self.discriminator, "discriminator_optimizer": self.discriminator_optimizer}
        if self.average is not None:
            own["average"] = self.average
        return super().state_dict() | {name: part.state_dict() for name, part in own.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.discriminator.load_state_dict(state["discriminator"])
        self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _mean(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda recon, x: of(recon - x).flatten(1).mean(1)
