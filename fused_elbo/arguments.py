"""From the arguments of the public functions to those of the operators: checked, of one dtype and shape, in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, tracing
from . import sigma as modes
from .reference import compute_dtype
from .sigma import Constant, Kind, Optimal

# log_sigma, sigma_mode, softclip, log_sigma_value, min_log_sigma
Sigma = tuple[Tensor | None, Kind, bool, float, float]


def of_elbo(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    beta: float | Tensor,
    sigma: str | float | Constant | Optimal,
    log_sigma: Tensor | None,
    min_log_sigma: float,
    prior: tuple[Tensor, Tensor] | None,
    free_bits: float,
    capacity: float | Tensor | None,
    reduction: str,
    may_be_empty: bool,
) -> tuple[Any, ...]:
    """What `of_forward` returns, for a call of `decoupled_elbo`."""
    checks.pair("recon", recon, "target", target, may_be_empty)
    checks.pair("mu", mu, "logvar", logvar, may_be_empty)
    checks.same_batch(recon, mu)
    checks.weight(beta, mu.shape[0], recon)
    if capacity is not None:
        checks.capacity(capacity, beta, reduction, recon)
    return of_forward(
        (recon, target, *latents(mu, logvar, prior)),
        beta=beta,
        sigma=of_sigma((recon, target, mu, logvar), sigma, log_sigma, min_log_sigma),
        free_bits=free_bits,
        capacity=capacity,
        reduction=reduction,
    )


def of_sigma(
    inputs: tuple[Tensor, ...],
    sigma: str | float | Constant | Optimal,
    log_sigma: Tensor | None,
    min_log_sigma: float,
) -> Sigma:
    recon = inputs[0]
    checks.number("min_log_sigma", min_log_sigma, -modes.LOG_SIGMA_RANGE, modes.LOG_SIGMA_RANGE)
    if log_sigma is not None:
        if not (isinstance(sigma, str) and sigma == "optimal"):
            raise ValueError(f"sigma and log_sigma exclude each other, got sigma={sigma!r} beside a log_sigma")
        checks.log_sigma(log_sigma, recon)
        batch = recon.shape[0]
        of_one = log_sigma.shape[1:].numel() == 1
        per_image = of_one and log_sigma.dim() in (1, recon.dim()) and tracing.known(log_sigma.shape[0] == batch)
        if per_image:  # before what follows: a batch may be of one image
            return log_sigma.reshape(batch), Kind.GIVEN, False, 0.0, min_log_sigma
        if tracing.known(log_sigma.numel() == 1):
            return log_sigma.reshape(()), Kind.GIVEN, False, 0.0, min_log_sigma
        shape = (1,) * (recon.dim() - log_sigma.dim()) + tuple(log_sigma.shape)
        return log_sigma.reshape(shape), Kind.ELEMENT, False, 0.0, min_log_sigma
    mode = modes.resolve(sigma)
    if isinstance(mode, Optimal):
        kind = Kind.IMAGE if mode.per_image else Kind.BATCH
        return None, kind, mode.softclip, 0.0, min_log_sigma
    if torch.compiler.is_compiling():
        return _on_device(mode.value, *inputs).log(), Kind.GIVEN, False, 0.0, min_log_sigma
    return None, Kind.GIVEN, False, math.log(mode.value), min_log_sigma


def _on_device(value: float, *like: Tensor | None) -> Tensor:
    """A Python number as a tensor. A number is part of the code that Dynamo compiles; a schedule of β as plain floats
    would compile anew at every value and fail after eight."""
    first = next(t for t in like if t is not None)
    return first.new_ones((), dtype=compute_dtype(*like)) * value


def latents(
    mu: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Of one dtype, the widest, and one shape; autograd turns their gradients back."""
    if prior is None and mu.dtype == logvar.dtype:
        return mu, logvar, None, None
    if prior is not None:
        checks.prior(prior, mu)
    return _alike(mu, logvar, prior)


def of_levels(
    mu: Sequence[Tensor],
    logvar: Sequence[Tensor],
    prior: Sequence[tuple[Tensor, Tensor] | None] | None,
    may_be_empty: bool,
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """What `latents` returns, for each level of a hierarchy."""
    checks.levels(mu, logvar, prior)
    priors = [None] * len(mu) if prior is None else prior
    for i, (m, l, p) in enumerate(zip(mu, logvar, priors, strict=True)):
        checks.pair(f"mu[{i}]", m, f"logvar[{i}]", l, may_be_empty)
        checks.same_batch(mu[0], m, "mu[0]", f"mu[{i}]")
        if p is not None:
            checks.prior(p, m, f"prior[{i}]", f"mu[{i}]")
    checks.device_served(mu[0])
    return [_alike(*level) for level in zip(mu, logvar, priors, strict=True)]


def _alike(
    mu: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    every = (mu, logvar, *(prior or ()))
    # A prior that the batch shares sums its gradient over the batch: in fp32, then rounded once to its own dtype.
    shared = prior is not None and any(t.shape != mu.shape for t in prior)
    if shared or any(t.dtype != mu.dtype for t in every):
        dtype = compute_dtype(*every)
        every = tuple(t.to(dtype) for t in every)
    if prior is None:
        return every[0], every[1], None, None
    if shared:
        every = (*every[:2], every[2].expand(mu.shape), every[3].expand(mu.shape))
    return every[0], every[1], every[2], every[3]


def of_forward(
    tensors: tuple[Tensor | None, ...],  # recon, target, mu, logvar, prior_mu, prior_logvar
    *,
    reduction: str,
    beta: float | Tensor = 1.0,
    sigma: Sigma = (None, Kind.GIVEN, False, 0.0, 0.0),
    free_bits: float = 0.0,
    capacity: float | Tensor | None = None,
) -> tuple[Any, ...]:
    """The nine tensors of `ops.forward`, then its plain values as one tuple."""
    recon, target, mu, logvar, prior_mu, prior_logvar = tensors
    log_sigma, kind, softclip, log_sigma_value, min_log_sigma = sigma
    index = checks.reduction(reduction)
    checks.number("free_bits", free_bits, 0)
    checks.device_served(recon if recon is not None else mu)  # type: ignore[arg-type]

    beta_tensor, beta_value = _knob(beta, recon, target, mu, logvar)
    capacity_tensor, capacity_value = _knob(capacity, recon, target, mu, logvar)
    values = (
        int(kind), softclip, log_sigma_value, float(min_log_sigma), float(free_bits),
        1.0 if beta_value is None else float(beta_value),
        None if capacity_value is None else float(capacity_value),
        index,
    )  # fmt: skip
    return recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta_tensor, capacity_tensor, values


def _knob(value: Any, *like: Tensor | None) -> tuple[Tensor | None, Any]:
    """(the tensor, the number): one of the two."""
    if value is None or isinstance(value, Tensor):
        return value, None
    return (_on_device(value, *like), None) if torch.compiler.is_compiling() else (None, value)


def of_grad_scale(grad_scale: float | Tensor | None, recon: Tensor) -> tuple[Tensor | None, float]:
    """`step`'s grad_scale and grad_scale_value."""
    if grad_scale is None:
        return None, 1.0
    checks.grad_scale(grad_scale, recon)
    if isinstance(grad_scale, Tensor):
        return grad_scale.reshape(()), 1.0
    return (_on_device(grad_scale, recon), 1.0) if torch.compiler.is_compiling() else (None, float(grad_scale))
