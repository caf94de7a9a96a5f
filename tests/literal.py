"""The loss written out element by element, with torch.distributions, sharing no line with the library.

In fp64 it is the truth; in the inputs' own dtype it is the eager code that a kernel must be no worse than.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Laplace, Normal, kl_divergence

from fused_elbo.rate import Capacity, FreeNats
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
    floor, q = kw.get("min_log_sigma", -7.0), exponent_of(kw)
    errors, weights = (recon - target).abs() ** q, weight_of(recon, kw)
    totals, counts = (
        per_sample(torch.where(weights > 0, weights * errors, 0)) + extra_of(recon, kw),
        per_sample(weights),
    )
    if not mode.per_image:
        totals, counts = totals.sum(), counts.sum()
    mean = totals / torch.where(counts > 0, counts, 1)
    if mode.softclip:
        sigma = (floor + F.softplus(mean.log() / q - floor)).exp()
    else:
        sigma = mean.clamp(min=math.exp(q * floor)) ** (1 / q)
    return as_batch(sigma, recon.shape[0], recon.dim())


def exponent_of(kw: dict[str, Any]) -> int:
    return 1 if kw.get("likelihood") == "laplace" else 2


def weight_of(recon: Tensor, kw: dict[str, Any]) -> Tensor:
    weight = kw.get("weight")
    return torch.ones_like(recon) if weight is None else weight.to(recon.dtype).expand(recon.shape)


def extra_of(recon: Tensor, kw: dict[str, Any]) -> Tensor:
    extra = kw.get("extra_error")
    return recon.new_zeros(()) if extra is None else extra.to(recon.dtype)


def nats_of(recon: Tensor, target: Tensor, kw: dict[str, Any]) -> Tensor:
    """−log p of each sample."""
    q, weights = exponent_of(kw), weight_of(recon, kw)
    recon, target = (torch.where(weights > 0, t, 0) for t in (recon, target))  # for 0 · NaN is NaN
    sigma = sigma_of(recon, target, kw)
    density = (Normal if q == 2 else Laplace)(recon, sigma, validate_args=False)
    nats = -density.log_prob(target)
    if kw.get("constant") is False:
        nats = nats - (math.log(2 * math.pi) / 2 if q == 2 else math.log(2))
    found = per_sample(torch.where(weights > 0, weights * nats, 0))
    if kw.get("extra_error") is not None:
        found = found + extra_of(recon, kw) / (q * sigma.reshape(-1) ** q)
    return found


def limited(rates: Tensor, kw: dict[str, Any]) -> Tensor:
    """What β multiplies, of each sample."""
    limit = kw.get("limit")
    if kw.get("capacity") is not None:
        limit = Capacity(kw["capacity"])
    if limit is None:
        return rates
    of = rates.mean().expand(rates.shape) if limit.per == "batch" else rates
    return of.clamp(min=limit.nats) if isinstance(limit, FreeNats) else (of - limit.nats).abs()


def literal_elbo(recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, **kw: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, distortion, rate)."""
    if target.dtype == torch.uint8:
        low, high = kw.get("target_range", (0, 1))
        wide = torch.promote_types(recon.dtype, torch.float32)
        target = low + (high - low) * target.to(wide) / 255
    if recon.dtype != target.dtype:
        recon, target = recon.to(torch.promote_types(recon.dtype, target.dtype)), target.to(recon.dtype)
    activation = {None: lambda y: y, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[kw.get("activation")]
    nats = nats_of(activation(recon), target, kw)
    if kw.get("logvar_range") is not None:
        logvar = logvar.clamp(*kw["logvar_range"])
    prior_mu, prior_logvar = kw.get("prior") or (torch.zeros_like(mu), torch.zeros_like(mu))
    posterior = Normal(mu, (logvar / 2).exp(), validate_args=False)
    prior = Normal(prior_mu.expand(mu.shape), (prior_logvar.expand(mu.shape) / 2).exp(), validate_args=False)
    kl = kl_divergence(posterior, prior)
    rate, clamped = per_sample(kl), limited(per_sample(kl.clamp(min=kw.get("free_bits", 0.0))), kw)

    batch, dims = recon.shape[0], recon.numel() // recon.shape[0]
    beta, reduction = kw.get("beta", 1.0), kw.get("reduction", "batchmean")
    if reduction == "none":
        return nats + beta * clamped, nats, rate
    elements = batch * dims if kw.get("weight") is None else weight_of(recon, kw).sum()
    scale = {"batchmean": 1 / batch, "sum": 1.0, "mean": 1 / elements}[reduction]
    return scale * (nats.sum() + (beta * clamped).sum()), scale * nats.sum(), scale * rate.sum()
