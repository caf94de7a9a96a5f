"""From the options of the public functions to a call of the operators: checked, of one dtype and shape, by name."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, likelihood, rate, tracing
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
    checks.data(recon, target, may_be_empty)
    checks.pair("mu", mu, "logvar", logvar, may_be_empty)
    checks.same_batch(recon, mu)
    if key is not None and key in _of_plain:
        dispatch.check_served(recon)
        return Tensors(recon, target, *_one_dtype(mu, logvar, None)), _of_plain[key]
    checks.beta(options["beta"], mu.shape[0], recon)
    sigma = resolve_sigma((recon, target, mu, logvar), options)
    call = _pack(recon, target, _one_dtype(mu, logvar, options["prior"]), sigma, options)
    if key is not None:
        if len(_of_plain) >= MOST:  # threads may have passed it
            _of_plain.clear()
        _of_plain[key] = call[1]
    return call


MOST = 128  # that are kept: β may be another number at every step
_of_plain: dict[Hashable, Options] = {}  # what came of options that have passed the checks, by `options.plain`


def nll(recon: Tensor, target: Tensor, options: Mapping[str, Any]) -> Call:
    checks.data(recon, target, options["process_group"] is not None)
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
    given = list(zip(mu, logvar, [None] * len(mu) if prior is None else prior, strict=True))
    usual = [checks.usual_level(mu[0], *level) for level in given]
    for i, (m, l, p) in enumerate(given):
        if usual[i]:
            continue
        checks.pair(f"mu[{i}]", m, f"logvar[{i}]", l, may_be_empty)
        checks.same_batch(mu[0], m, "mu[0]", f"mu[{i}]")
        if p is not None:
            checks.prior(p, m, f"prior[{i}]", f"mu[{i}]")
    dispatch.check_served(mu[0])
    return [
        (m, l, *(p or (None, None))) if is_usual else _widened(m, l, p)
        for (m, l, p), is_usual in zip(given, usual, strict=True)
    ]


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
    """With all that is neither data nor latents nor σ."""
    mu, logvar, prior_mu, prior_logvar = latents
    like = mu if recon is None else recon
    assert like is not None
    reduction, numbers = checks.reduction(options["reduction"]), checks.numbers(options)
    limit_mode, limit = _limit(options, like)
    exponent, activation = likelihood.exponent(options["likelihood"]), likelihood.activation(options["activation"])
    checks.flag("constant", options["constant"])
    target_low, target_high = checks.ascending("target_range", options["target_range"])
    logvar_range = options["logvar_range"]
    logvar_range = (None, None) if logvar_range is None else checks.ascending("logvar_range", logvar_range)
    weight, extra_error = _of_elements(recon, sigma, options)
    dispatch.check_served(like)
    beta, beta_value = _scalar(options["beta"], recon, target, mu, logvar)
    limit, limit_value = _scalar(limit, recon, target, mu, logvar)
    tensors = Tensors(
        recon, target, mu, logvar, sigma.log_sigma, prior_mu, prior_logvar, beta, extra_error, limit, weight
    )
    values = (
        exponent, activation, options["constant"], target_low, target_high,
        int(sigma.mode), sigma.softclip, sigma.log_sigma_value, *numbers,
        1.0 if beta_value is None else float(beta_value),
        limit_mode, 0.0 if limit_value is None else float(limit_value), *logvar_range,
        reduction,
    )  # fmt: skip
    return tensors, Options._make(values)


def _limit(options: Mapping[str, Any], like: Tensor) -> tuple[int, Any]:
    """(a rate.Kind, its nats)"""
    limit = checks.limit(options["limit"], options["capacity"])
    if limit is None:
        return 0, None
    kind = rate.kind_of(limit)
    called = "capacity" if options["limit"] is None else "limit"
    checks.nats(called, limit.nats, like)
    if rate.of_batch(kind):
        checks.of_batch(called, options["beta"], options["reduction"])
    return int(kind), limit.nats


def _of_elements(recon: Tensor | None, sigma: Sigma, options: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(weight, extra_error), as the operators take them."""
    weight, extra_error = options["weight"], options["extra_error"]
    if recon is None or (weight is None and extra_error is None):
        return None, None
    if weight is not None:
        checks.element_weight(weight, recon)
        weight = weight.reshape((1,) * (recon.dim() - weight.dim()) + tuple(weight.shape))
    if extra_error is not None:
        checks.extra_error(extra_error, recon)
        if sigma.mode == Kind.ELEMENT:
            shown = checks.shape(options["log_sigma"])
            raise ValueError(
                "extra_error: has no scale of its own where σ varies inside a sample, got a log_sigma of shape "
                f"{shown}; add it to the loss, with the weight that it is to have"
            )
    return weight, extra_error


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
