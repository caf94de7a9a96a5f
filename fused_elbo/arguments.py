"""From the options of the public functions to a call of the operators: checked, of one dtype and shape, by name."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, tracing
from . import sigma as modes
from .call import Options, Tensors, compute_dtype
from .sigma import Kind, Optimal

Call = tuple[Tensors, Options]


class Sigma(NamedTuple):
    """Where σ comes from, as the operators take it."""

    log_sigma: Tensor | None = None
    mode: Kind = Kind.GIVEN
    softclip: bool = False
    log_sigma_value: float = 0.0


def elbo(
    recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor, options: Mapping[str, Any], key: Hashable = None
) -> Call:
    """The call that `decoupled_elbo` means. Options that have a `key` (`options.plain`) are checked once."""
    may_be_empty = options["process_group"] is not None
    checks.pair("recon", recon, "target", target, may_be_empty)
    checks.pair("mu", mu, "logvar", logvar, may_be_empty)
    checks.same_batch(recon, mu)
    if key is not None and key in _of_plain:
        dispatch.check_served(recon)
        return Tensors(recon, target, *_one_dtype(mu, logvar, None)), _of_plain[key]
    checks.weight(options["beta"], mu.shape[0], recon)
    if options["capacity"] is not None:
        checks.capacity(options["capacity"], options["beta"], options["reduction"], recon)
    sigma = resolve_sigma((recon, target, mu, logvar), options)
    call = _pack(recon, target, _one_dtype(mu, logvar, options["prior"]), sigma, options)
    if key is not None:
        if len(_of_plain) == MOST:
            _of_plain.clear()
        _of_plain[key] = call[1]
    return call


MOST = 128  # that are kept: β may be another number at every step
_of_plain: dict[Hashable, Options] = {}  # what came of options that have passed the checks, by `options.plain`


def nll(recon: Tensor, target: Tensor, options: Mapping[str, Any]) -> Call:
    checks.pair("recon", recon, "target", target, options["process_group"] is not None)
    return _pack(recon, target, (None,) * 4, resolve_sigma((recon, target), options), options)


def kl(mu: Tensor, logvar: Tensor, prior: Any, options: Mapping[str, Any]) -> Call:
    checks.pair("mu", mu, "logvar", logvar, options["process_group"] is not None)
    return level(_one_dtype(mu, logvar, prior), options)


def level(latents: Sequence[Tensor | None], options: Mapping[str, Any]) -> Call:
    """The rate of `LATENTS`, checked before and of one dtype."""
    return _pack(None, None, latents, Sigma(), options)


def levels(
    mu: Sequence[Tensor],
    logvar: Sequence[Tensor],
    prior: Sequence[tuple[Tensor, Tensor] | None] | None,
    may_be_empty: bool,
) -> list[Sequence[Tensor | None]]:
    """mu, logvar, prior_mu, prior_logvar of each level of a hierarchy."""
    checks.levels(mu, logvar, prior)
    priors = [None] * len(mu) if prior is None else prior
    for i, (m, l, p) in enumerate(zip(mu, logvar, priors, strict=True)):
        checks.pair(f"mu[{i}]", m, f"logvar[{i}]", l, may_be_empty)
        checks.same_batch(mu[0], m, "mu[0]", f"mu[{i}]")
        if p is not None:
            checks.prior(p, m, f"prior[{i}]", f"mu[{i}]")
    dispatch.check_served(mu[0])
    return [_widened(*each) for each in zip(mu, logvar, priors, strict=True)]


def resolve_sigma(inputs: tuple[Tensor, ...], options: Mapping[str, Any]) -> Sigma:
    recon, sigma, log_sigma = inputs[0], options["sigma"], options["log_sigma"]
    if log_sigma is not None:
        if not (isinstance(sigma, str) and sigma == "optimal"):
            raise ValueError(f"sigma and log_sigma exclude each other, got sigma={sigma!r} beside a log_sigma")
        checks.log_sigma(log_sigma, recon)
        batch = recon.shape[0]
        of_one = log_sigma.shape[1:].numel() == 1
        per_image = of_one and log_sigma.dim() in (1, recon.dim()) and tracing.known(log_sigma.shape[0] == batch)
        if per_image:  # before what follows: a batch may be of one image
            return Sigma(log_sigma.reshape(batch))
        if tracing.known(log_sigma.numel() == 1):
            return Sigma(log_sigma.reshape(()))
        shape = (1,) * (recon.dim() - log_sigma.dim()) + tuple(log_sigma.shape)
        return Sigma(log_sigma.reshape(shape), Kind.ELEMENT)
    mode = modes.resolve(sigma)
    if isinstance(mode, Optimal):
        return Sigma(None, Kind.IMAGE if mode.per_image else Kind.BATCH, mode.softclip)
    if torch.compiler.is_compiling():
        return Sigma(_on_device(mode.value, *inputs).log())
    return Sigma(log_sigma_value=math.log(mode.value))


def _pack(
    recon: Tensor | None,
    target: Tensor | None,
    latents: Sequence[Tensor | None],
    sigma: Sigma,
    options: Mapping[str, Any],
) -> Call:
    """With beta, capacity and the options that are numbers."""
    mu, logvar, prior_mu, prior_logvar = latents
    reduction, numbers = checks.reduction(options["reduction"]), checks.numbers(options)
    dispatch.check_served(mu if recon is None else recon)  # type: ignore[arg-type]
    beta, beta_value = _scalar(options["beta"], recon, target, mu, logvar)
    capacity, capacity_value = _scalar(options["capacity"], recon, target, mu, logvar)
    tensors = Tensors(recon, target, mu, logvar, sigma.log_sigma, prior_mu, prior_logvar, beta, capacity)
    values = (
        int(sigma.mode), sigma.softclip, sigma.log_sigma_value, *numbers,
        1.0 if beta_value is None else float(beta_value),
        None if capacity_value is None else float(capacity_value),
        reduction,
    )  # fmt: skip
    return tensors, Options._make(values)


def _scalar(value: Any, *like: Tensor | None) -> tuple[Tensor | None, Any]:
    """(the tensor, the number): one of the two."""
    if value is None or isinstance(value, Tensor):
        return value, None
    return (_on_device(value, *like), None) if torch.compiler.is_compiling() else (None, value)


def _on_device(value: float, *like: Tensor | None) -> Tensor:
    """A Python number as a tensor. A number is part of the code that Dynamo compiles; a schedule of β as plain floats
    would compile anew at every value and fail after eight."""
    one = next(t for t in like if t is not None)
    return one.new_ones((), dtype=compute_dtype(*like)) * value


def _one_dtype(mu: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor] | None) -> Sequence[Tensor | None]:
    """mu, logvar and the prior's, all of the widest dtype and of mu's shape; autograd turns their gradients back."""
    if prior is None and mu.dtype == logvar.dtype:
        return mu, logvar, None, None
    if prior is not None:
        checks.prior(prior, mu)
    return _widened(mu, logvar, prior)


def _widened(mu: Tensor, logvar: Tensor, prior: tuple[Tensor, Tensor] | None) -> Sequence[Tensor | None]:
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
    return every


def grad_scale(value: float | Tensor | None, recon: Tensor) -> tuple[Tensor | None, float]:
    """`step`'s grad_scale and grad_scale_value."""
    if value is None:
        return None, 1.0
    checks.grad_scale(value, recon)
    if isinstance(value, Tensor):
        return value.reshape(()), 1.0
    return (_on_device(value, recon), 1.0) if torch.compiler.is_compiling() else (None, float(value))
