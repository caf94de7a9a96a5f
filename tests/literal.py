"""The loss written out element by element, with torch.distributions, sharing no line with the library.

In fp64 it is the truth; in the inputs' own dtype it is the eager code that a kernel must be no worse than.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fused_elbo.sigma import Optimal


def per_sample(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1) if x.dim() > 1 else x


def as_batch(value: Tensor, batch: int, dim: int) -> Tensor:
    """A 1-D log σ is one value or one per image: put its values along the batch."""
    return value.expand(batch).reshape(batch, *[1] * (dim - 1)) if value.dim() == 1 else value


def sigma_of(recon: Tensor, target: Tensor, kw: dict[str, Any]) -> Tensor:
    """The decoder's standard deviation, of a shape that broadcasts against recon."""
    if kw.get("log_sigma") is not None:
        return as_batch(kw["log_sigma"].to(recon.dtype), recon.shape[0], recon.dim()).exp()
    mode = kw.get("sigma", "optimal")
    if isinstance(mode, float):
        return torch.full((), mode, dtype=recon.dtype)
    if isinstance(mode, str):
        mode = Optimal(per_image=mode == "optimal-per-image")
    floor = kw.get("min_log_sigma", -7.0)
    square = (recon - target).square()
    mse = square.reshape(recon.shape[0], -1).mean(1) if mode.per_image else square.mean()
    if mode.softclip:
        sigma = (floor + F.softplus(mse.log() / 2 - floor)).exp()
    else:
        sigma = mse.clamp(min=math.exp(2 * floor)).sqrt()
    return as_batch(sigma, recon.shape[0], recon.dim())


def literal_elbo(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, **kw: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, distortion, rate)."""
    if recon.dtype != target.dtype:
        recon, target = recon.to(torch.promote_types(recon.dtype, target.dtype)), target.to(recon.dtype)
    nats = per_sample(-Normal(recon, sigma_of(recon, target, kw), validate_args=False).log_prob(target))
    prior_mu, prior_logvar = kw.get("prior") or (torch.zeros_like(mu), torch.zeros_like(mu))
    posterior = Normal(mu, (logvar / 2).exp(), validate_args=False)
    prior = Normal(prior_mu.expand(mu.shape), (prior_logvar.expand(mu.shape) / 2).exp(), validate_args=False)
    kl = kl_divergence(posterior, prior)
    rate, clamped = per_sample(kl), per_sample(kl.clamp(min=kw.get("free_bits", 0.0)))

    batch, dims = recon.shape[0], recon.numel() // recon.shape[0]
    beta, reduction = kw.get("beta", 1.0), kw.get("reduction", "batchmean")
    if reduction == "none":
        return nats + beta * clamped, nats, rate
    scale = {"batchmean": 1 / batch, "sum": 1.0, "mean": 1 / (batch * dims)}[reduction]
    if kw.get("capacity") is not None:
        penalty = beta * (clamped.mean() - kw["capacity"]).abs() * batch
    else:
        penalty = (beta * clamped).sum()
    return scale * (nats.sum() + penalty), scale * nats.sum(), scale * rate.sum()
