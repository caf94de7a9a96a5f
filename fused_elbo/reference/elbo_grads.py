"""Stage three: the gradients, from the tensors again and the stats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Gradients, GradOutputs, Options, Tensors, has_capacity
from ..sigma import Kind
from . import math
from .elbo_finalize import BatchTerms, batch_terms, capacity_gap


class Weights(NamedTuple):
    """∂L/∂ of what a sample has, [B] each."""

    distortion: Tensor
    kl_clamped: Tensor  # reaches the elements that free_bits lets through
    kl: Tensor  # reaches all
    beta: Tensor


def gradients(tensors: Tensors, options: Options, stats: Tensor, grad_outputs: GradOutputs) -> Gradients:
    """The gradient of grad_loss·loss + grad_distortion·distortion + grad_rate·rate, each in its input's dtype."""
    batch = batch_terms(stats, tensors, options)
    weights = weights_of(stats, batch, tensors, options, grad_outputs)
    recon, target, log_sigma = _data_gradients(weights.distortion, stats[0, :-1], batch, tensors, options)
    mu, logvar, prior_mu, prior_logvar = _latent_gradients(weights, tensors, options)
    beta = None if tensors.beta is None else _of_its_shape(weights.beta, tensors.beta)
    return Gradients(recon, target, mu, logvar, log_sigma, prior_mu, prior_logvar, beta)


def weights_of(
    stats: Tensor, batch: BatchTerms, tensors: Tensors, options: Options, grad_outputs: GradOutputs
) -> Weights:
    s, _, kl_clamped = stats[:, :-1].unbind(0)
    zero = s.new_zeros(s.shape[0])
    g_loss, g_distortion, g_rate = (
        zero if g is None else g.to(s.dtype).expand(s.shape[0]) * batch.weight for g in grad_outputs
    )
    gap_sign = torch.ones_like(s[0])  # ∂(what β multiplies)/∂(mean of the clamped rate)
    of_beta = g_loss * kl_clamped
    if has_capacity(tensors, options):
        gap = capacity_gap(batch, tensors, options)
        gap_sign, of_beta = gap.sign(), g_loss * gap.abs()  # summed over the batch: B·weight·|gap|
    beta = math.scalar(tensors.beta, options.beta_value, s)
    return Weights(g_loss + g_distortion, g_loss * beta * gap_sign, g_rate, of_beta)


def _data_gradients(
    w: Tensor, s: Tensor, batch: BatchTerms, tensors: Tensors, options: Options
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(∂x̂, ∂x, ∂ log σ), for w_i = ∂L/∂distortion_i."""
    recon, target, log_sigma = tensors.recon, tensors.target, tensors.log_sigma
    if recon is None or target is None:
        return None, None, None
    e = recon.to(s.dtype) - target.to(s.dtype)
    of_log_sigma = None
    if options.sigma_mode == Kind.ELEMENT:
        assert log_sigma is not None
        scaled, of_sigma = math.scaled_error_grad(e, log_sigma.to(s.dtype))
        g, of_log_sigma = _per_sample(w, recon) * scaled, _per_sample(w, recon) * of_sigma
    elif options.sigma_mode == Kind.GIVEN:
        inverse = (-2 * math.scalar(log_sigma, options.log_sigma_value, s)).exp()
        g = _per_sample(w * inverse, recon) * e
        of_log_sigma = w * math.distortion_slope(s, batch.dims, inverse)
    else:
        g = _per_sample(_recon_scale(w, s, batch, options), recon) * e
    if log_sigma is None or of_log_sigma is None:
        return g.to(recon.dtype), (-g).to(target.dtype), None
    return g.to(recon.dtype), (-g).to(target.dtype), _of_its_shape(of_log_sigma, log_sigma)


def _recon_scale(w: Tensor, s: Tensor, batch: BatchTerms, options: Options) -> Tensor:
    """a_i of an optimal σ. It depends on x̂ through the sum of squares: w_i/σ² and, through log σ, for a σ that the
    batch shares slope · Σ_j w_j (D − S_j/σ²)/ΣS."""
    shared = options.sigma_mode == Kind.BATCH
    total = batch.s if shared else s
    inverse, slope = math.optimal_sigma_grad(total, batch.elements if shared else batch.dims, options)
    of_log_sigma = w * math.distortion_slope(s, batch.dims, inverse)
    of_log_sigma = of_log_sigma.sum() if shared else of_log_sigma
    return w * inverse + math.sigma_term(slope, of_log_sigma, total)


def _latent_gradients(weights: Weights, tensors: Tensors, options: Options) -> list[Tensor | None]:
    """[∂μ, ∂l, ∂μ_p, ∂l_p]."""
    inputs = (tensors.mu, tensors.logvar, tensors.prior_mu, tensors.prior_logvar)
    if tensors.mu is None or tensors.logvar is None:
        return [None] * 4
    dtype = weights.kl.dtype
    mu, logvar = tensors.mu.to(dtype), tensors.logvar.to(dtype)
    prior_mu, prior_logvar = (None if t is None else t.to(dtype) for t in inputs[2:])
    grad_kl_clamped, grad_kl = _per_sample(weights.kl_clamped, mu), _per_sample(weights.kl, mu)
    if options.free_bits > 0:
        passes = math.kl(mu, logvar, prior_mu, prior_logvar) >= options.free_bits
        grad_kl_clamped = torch.where(passes, grad_kl_clamped, 0.0)
    b = grad_kl_clamped + grad_kl
    of_kl = math.kl_grad(mu, logvar, prior_mu, prior_logvar)
    return [None if g is None or t is None else (b * g).to(t.dtype) for g, t in zip(of_kl, inputs, strict=True)]


def _of_its_shape(g: Tensor, like: Tensor) -> Tensor:
    """Summed over what a broadcast input repeats; then rounded, once."""
    return g.sum_to_size(like.shape).to(like.dtype)


def _per_sample(w: Tensor, like: Tensor) -> Tensor:  # [B] -> [B, 1, …]
    return w.reshape((like.shape[0],) + (1,) * (like.dim() - 1))
