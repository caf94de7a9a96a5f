"""What a trained VAE does with its latent dimensions: which of them carry information, and what they are worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_elbo import gaussian_kl

from .data import to_unit

ACTIVE_VARIANCE = 0.5  # of the posterior, averaged over the data: near 0 where z_k is used, 1 where it is ignored
USED = 0.01
CHUNK = 512  # images encoded or decoded at once


@torch.no_grad()
def encode(model: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
    """mu and logvar of q(z|x) for all of `data`, each [N, K]."""
    model.eval()
    parts = [model.encode(to_unit(chunk.to(_device(model)))) for chunk in data.split(CHUNK)]
    mu, logvar = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return mu, logvar


@torch.no_grad()
def decode(model: nn.Module, z: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model.decode(chunk.to(_device(model)))[0].cpu() for chunk in z.split(CHUNK)])


def images_of(model: nn.Module, z: Tensor) -> Tensor:
    """E[x|z], clipped to [0, 1]."""
    return decode(model, z).clamp(0, 1)


def draw(mu: Tensor, logvar: Tensor, seed: int = 0) -> Tensor:
    """One z ~ q(z|x) for each x: a sample of the aggregate posterior q(z)."""
    return mu + torch.exp(0.5 * logvar) * prior(len(mu), mu.shape[1], seed)


def prior(count: int, latent_dim: int, seed: int = 0) -> Tensor:
    return torch.randn(count, latent_dim, generator=torch.Generator().manual_seed(seed))


def active(logvar: Tensor) -> Tensor:
    """[K], True where the posterior's variance, averaged over the data, is below ACTIVE_VARIANCE.

    At an optimum it goes to 0 with γ in the dimensions that are used, and to 1, the prior's, in the superfluous ones
    (Dai, Wipf, ICLR 2019); where the line is drawn between them matters only far from such an optimum.
    """
    return logvar.exp().mean(0) < ACTIVE_VARIANCE


def rates(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z_k|x) ‖ N(0, 1)) of each dimension, averaged over the data, in nats: [K]."""
    return gaussian_kl(mu.T.contiguous(), logvar.T.contiguous(), reduction="none") / len(mu)


def pruned(z: Tensor, dropped: Tensor) -> Tensor:
    """z with these dimensions at 0, the prior's mean."""
    z = z.clone()
    z[:, dropped] = 0
    return z


def used(model: nn.Module, z: Tensor, total_variance: float) -> Tensor:
    """[K], True where the decoder needs z_k: its mean in place of it moves the output by more than USED of the
    data's variance.

    For codes without a posterior variance; where there is one, `active` says the same of an optimum.
    """
    whole = decode(model, z)
    moved = torch.empty(z.shape[1])
    for k in range(z.shape[1]):
        without = z.clone()
        without[:, k] = z[:, k].mean()
        moved[k] = (decode(model, without) - whole).square().sum(1).mean()
    return moved > USED * total_variance


def latent_gradient(objective: nn.Module, x: Tensor, seed: int = 0) -> float:
    """Mean over the batch of ‖∂L_i/∂z_i‖: the gradient, in nats, that reaches the encoder through the sampled z."""
    model, criterion = objective.model.eval(), objective.criterion.eval()
    mu, logvar = encode(model, x)
    z = draw(mu, logvar, seed).to(_device(model)).requires_grad_()
    x = to_unit(x.to(z.device))
    loss = criterion(model.decode(z)[0], x, mu.to(z), logvar.to(z)).loss
    (gradient,) = torch.autograd.grad(loss, z)
    return float(len(x) * gradient.norm(dim=1).mean())  # the loss is the batch's mean


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
