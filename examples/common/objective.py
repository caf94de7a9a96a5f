"""A VAE together with its loss, for every way of treating the decoder's sigma that fused_elbo offers."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fused_elbo import ELBO, DecoupledELBO, LearnedSigmaELBO, decoupled_elbo, sigma

from .linear import LinearVAE
from .mlp import MLPVAE
from .models import ConvVAE
from .ranks import group

SIGMA_MODES = {
    "optimal": "the closed form sigma² = MSE of the batch",
    "optimal-per-image": "sigma² = MSE of each image (no valid bound: sigma sees x)",
    "optimal-softclip": "optimal, with the soft floor of the calibrated-decoder code",
    "learned": "one trained scalar",
    "learned-per-channel": "one trained scalar per colour channel",
    "per-pixel": "the decoder outputs log sigma of every pixel",
}
ANALYTIC = ("optimal", "optimal-per-image", "optimal-softclip")
MOMENTUM = 0.1  # of the running sigma that replaces the closed form wherever the target must not be seen
PER_PIXEL_FLOOR = -3.0  # default lower bound of per-pixel log sigma (sigma = 0.05); the upper one is 0 (sigma = 1)


def default_min_log_sigma(sigma_mode: str) -> float:
    return PER_PIXEL_FLOOR if sigma_mode == "per-pixel" else -7.0


class PerPixelELBO(nn.Module):
    """decoupled_elbo with the log sigma that the decoder itself puts out."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, log_sigma: Tensor) -> ELBO:
        return decoupled_elbo(recon, target, mu, logvar, beta=self.beta, log_sigma=log_sigma, process_group=group())


def make_criterion(
    sigma_mode: str, beta: float, *, channels: int, min_log_sigma: float | None = None, init_log_sigma: float = 0.0
) -> nn.Module:
    """The loss module for one of SIGMA_MODES or for a number, which is a constant sigma; over all ranks."""
    floor = default_min_log_sigma(sigma_mode) if min_log_sigma is None else min_log_sigma
    if sigma_mode in ANALYTIC:
        mode = sigma.Optimal(softclip=True) if sigma_mode == "optimal-softclip" else sigma_mode
        return DecoupledELBO(beta=beta, sigma=mode, min_log_sigma=floor, momentum=MOMENTUM, process_group=group())
    if sigma_mode == "learned":
        return LearnedSigmaELBO(init=init_log_sigma, beta=beta, process_group=group())
    if sigma_mode == "learned-per-channel":
        return LearnedSigmaELBO(channels=channels, init=init_log_sigma, beta=beta, process_group=group())
    if sigma_mode == "per-pixel":
        return PerPixelELBO(beta)
    return DecoupledELBO(beta=beta, sigma=float(sigma_mode), process_group=group())


class VAEObjective(nn.Module):
    """images in [0, 1], or vectors -> ELBO, whose sigma is always one number here: the geometric mean of all sigmas.

    One module, so that a trainer sees the parameters of the model and of the loss, and torch.compile sees the whole
    forward pass. In evaluation mode the closed-form sigmas are replaced by their running average over training.
    """

    def __init__(self, model: ConvVAE | LinearVAE | MLPVAE, criterion: nn.Module) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, x: Tensor) -> ELBO:
        out = self.model(x)
        if out.log_sigma is not None:
            elbo = self.criterion(out.recon, x, out.mu, out.logvar, out.log_sigma)
            log_sigma = out.log_sigma.detach()
        else:
            elbo = self.criterion(out.recon, x, out.mu, out.logvar)
            log_sigma = (
                elbo.sigma.log() if elbo.sigma is not None else self.criterion.get_parameter("log_sigma").detach()
            )
        return elbo._replace(sigma=log_sigma.mean().exp())

    def mean(self, z: Tensor) -> Tensor:
        """E[x|z]"""
        return self.model.decode(z)[0]


def make_objective(
    shape: tuple[int, int, int],
    sigma_mode: str,
    beta: float,
    *,
    latent_dim: int,
    width: int,
    min_log_sigma: float | None = None,
    init_log_sigma: float = 0.0,
) -> VAEObjective:
    floor = default_min_log_sigma(sigma_mode) if min_log_sigma is None else min_log_sigma
    per_pixel = sigma_mode == "per-pixel"
    model = ConvVAE(shape, latent_dim, width, per_pixel_sigma=per_pixel, log_sigma_bounds=(floor, 0.0))
    criterion = make_criterion(
        sigma_mode, beta, channels=shape[0], min_log_sigma=min_log_sigma, init_log_sigma=init_log_sigma
    )
    return VAEObjective(model, criterion)


def bits_per_dim(nats: float, dims: int) -> float:
    return nats / (dims * math.log(2))
