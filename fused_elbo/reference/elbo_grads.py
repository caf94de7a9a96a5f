"""Stage three: the gradients, from the tensors again and the stats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import rate
from ..call import Gradients, GradOutputs, Options, Tensors
from ..sigma import Kind
from . import math
from .elbo_finalize import BatchTerms, batch_terms, limit_of, log_sigma_of
from .elbo_stats import elements


class Weights(NamedTuple):
    """∂L/∂ of what a sample has, [B] each."""

    distortion: Tensor
    kl_clamped: Tensor  # reaches the elements that free_bits lets through
    kl: Tensor  # reaches all
    beta: Tensor


class Factors(NamedTuple):
    """What a sample's elements are multiplied by, and its part of a gradient that is O(B), [B] each."""

    recon_scale: Tensor  # q ∂L/∂A_i; w_i where σ varies inside the sample
    log_sigma: Tensor  # w_i (D − A_i/σ^q)


def gradients(tensors: Tensors, options: Options, stats: Tensor, grad_outputs: GradOutputs) -> Gradients:
    """The gradient of grad_loss·loss + grad_distortion·distortion + grad_rate·rate, each in its input's dtype."""
    batch = batch_terms(stats, tensors, options)
    weights = weights_of(stats, batch, tensors, options, grad_outputs)
    recon, target, log_sigma, extra_error = _data_gradients(weights.distortion, stats[0, :-1], batch, tensors, options)
    mu, logvar, prior_mu, prior_logvar = _latent_gradients(weights, tensors, options)
    beta = None if tensors.beta is None else _of_its_shape(weights.beta, tensors.beta)
    return Gradients(recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta, extra_error)


def weights_of(
    stats: Tensor, batch: BatchTerms, tensors: Tensors, options: Options, grad_outputs: GradOutputs
) -> Weights:
    a, _, kl_clamped = stats[:3, :-1].unbind(0)
    zero = a.new_zeros(a.shape[0])
    g_loss, g_distortion, g_rate = (
        zero if g is None else g.to(a.dtype).expand(a.shape[0]) * batch.weight for g in grad_outputs
    )
    beta, limit = math.scalar(tensors.beta, options.beta_value, a), limit_of(tensors, options, a)
    if limit is None:
        return Weights(g_loss + g_distortion, g_loss * beta, g_rate, g_loss * kl_clamped)
    limited = batch.kl_clamped if rate.of_batch(options.limit_mode) else kl_clamped
    of_kl = g_loss * beta * math.limited_slope(limited, limit, options)
    return Weights(g_loss + g_distortion, of_kl, g_rate, g_loss * math.limited(limited, limit, options))


def _data_gradients(
    w: Tensor, a: Tensor, batch: BatchTerms, tensors: Tensors, options: Options
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(∂ recon, ∂x, ∂ log σ, ∂ extra_error), for w_i = ∂L/∂distortion_i."""
    recon, target, log_sigma = tensors.recon, tensors.target, tensors.log_sigma
    if recon is None or target is None:
        return None, None, None, None
    data, q = elements(tensors, options, a.dtype), options.exponent
    factors = _factors(w, a, batch, tensors, options)
    if data.log_sigma is None:
        of_error, of_log_sigma = math.slope(data.error, q), factors.log_sigma
    else:
        of_error, of_sigma = math.scaled_error_grad(data.error, data.log_sigma, q)
        of_log_sigma = _per_sample(w, recon) * of_sigma
        if data.weight is not None:
            of_log_sigma = data.weight * of_log_sigma
    g = _per_sample(factors.recon_scale, recon) * of_error
    if data.weight is not None:
        g = data.weight * g
    activation = math.activation_slope(data.y, options)
    of_recon = g if activation is None else g * activation
    return (
        of_recon.to(recon.dtype),
        (-g).to(target.dtype) if target.is_floating_point() else None,
        None if log_sigma is None else _of_its_shape(of_log_sigma, log_sigma),
        None if tensors.extra_error is None else _of_its_shape(factors.recon_scale / q, tensors.extra_error),
    )


def _factors(w: Tensor, a: Tensor, batch: BatchTerms, tensors: Tensors, options: Options) -> Factors:
    """An optimal σ depends on x̂ through A: recon_scale is w_i/σ^q and, through log σ, for a σ that the batch shares
    slope · Σ_j w_j (D − A_j/σ^q)/ΣA besides."""
    if options.sigma_mode == Kind.ELEMENT:
        return Factors(w, w)
    if options.sigma_mode == Kind.GIVEN:
        inverse = (-options.exponent * log_sigma_of(a, batch, tensors, options)).exp()
        return Factors(w * inverse, w * math.distortion_slope(a, batch.dims, inverse))
    shared = options.sigma_mode == Kind.BATCH
    total = batch.a if shared else a
    inverse, slope = math.optimal_sigma_grad(total, batch.elements if shared else batch.dims, options)
    of_log_sigma = w * math.distortion_slope(a, batch.dims, inverse)
    through_sigma = of_log_sigma.sum() if shared else of_log_sigma
    return Factors(w * inverse + math.sigma_term(slope, through_sigma, total), of_log_sigma)


def _latent_gradients(weights: Weights, tensors: Tensors, options: Options) -> list[Tensor | None]:
    """[∂μ, ∂l, ∂μ_p, ∂l_p]."""
    inputs = (tensors.mu, tensors.logvar, tensors.prior_mu, tensors.prior_logvar)
    if tensors.mu is None or tensors.logvar is None:
        return [None] * 4
    dtype = weights.kl.dtype
    mu, logvar = tensors.mu.to(dtype), tensors.logvar.to(dtype)
    l = math.clamped(logvar, options)
    prior_mu, prior_logvar = (None if t is None else t.to(dtype) for t in inputs[2:])
    grad_kl_clamped, grad_kl = _per_sample(weights.kl_clamped, mu), _per_sample(weights.kl, mu)
    if options.free_bits > 0:
        passes = math.kl(mu, l, prior_mu, prior_logvar) >= options.free_bits
        grad_kl_clamped = torch.where(passes, grad_kl_clamped, 0.0)
    b = grad_kl_clamped + grad_kl
    of_kl = math.kl_grad(mu, l, prior_mu, prior_logvar)
    of_kl = of_kl._replace(logvar=math.clamped_grad(of_kl.logvar, logvar, options))
    return [None if g is None or t is None else (b * g).to(t.dtype) for g, t in zip(of_kl, inputs, strict=True)]


def _of_its_shape(g: Tensor, like: Tensor) -> Tensor:
    """Summed over what a broadcast input repeats; then rounded, once."""
    return g.sum_to_size(like.shape).to(like.dtype)


def _per_sample(w: Tensor, like: Tensor) -> Tensor:  # [B] -> [B, 1, …]
    return w.reshape((like.shape[0],) + (1,) * (like.dim() - 1))
