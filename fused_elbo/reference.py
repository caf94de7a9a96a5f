"""The loss in plain PyTorch: the truth in tests, the formulas of double backward, and the backend of last resort.

Notation: e = x̂ − x, D data dimensions of a sample, l = log σ_z², B samples. Three stages:

    stats       S_i = Σ_d e_id²   and   KL_i                      the only numbers through which the data enter
    finalize    S, KL → loss, distortion, rate, σ                 O(B)
    grads       ∂L/∂x̂ = a_i e    ∂L/∂μ = b_i μ    ∂L/∂l = b_i ½(exp(l) − 1)

Where σ varies inside a sample, S_i is Σ_d [e²/σ_d² + 2 log σ_d] and the first line of grads has σ_d in it.
Everything is computed in fp32, or in fp64 if any input is fp64, and is differentiable by autograd.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .sigma import Kind

LOG_2PI = math.log(2 * math.pi)
REDUCTIONS = ("batchmean", "sum", "mean", "none")  # an operator's `reduction` is the index
BATCHMEAN, SUM, MEAN, NONE = range(4)


class Gradients(NamedTuple):
    recon: Tensor | None
    target: Tensor | None
    mu: Tensor | None
    logvar: Tensor | None
    log_sigma: Tensor | None
    prior_mu: Tensor | None
    prior_logvar: Tensor | None
    beta: Tensor | None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:  # [B, *any] -> [B, D]
    return x.to(dtype).reshape(x.shape[0], -1)


def excess(t: Tensor) -> Tensor:
    """exp(t) − 1 − t, which is t²/2 near 0, where the literal formula (and expm1(t) − t) has cancelled."""
    near = t.abs() < 0.5
    small = torch.where(near, t, 0.0)  # far out the series would overflow, and its NaN reach the second derivative
    series = torch.ones_like(t)
    last = 18 if t.dtype == torch.float64 else 9
    for n in range(last, 2, -1):  # t²/2 (1 + t/3 (1 + t/4 (… )))
        series = 1 + series * small / n
    return torch.where(near, 0.5 * small * small * series, t.exp() - 1 - t)


def kl_elements(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
    """½[(μ − μ_p)²/σ_p² + exp(t) − 1 − t], t = l − l_p; the standard normal prior is μ_p = l_p = 0."""
    if prior_mu is None or prior_logvar is None:
        return 0.5 * (mu.square() + excess(logvar))
    return 0.5 * ((mu - prior_mu).square() * (-prior_logvar).exp() + excess(logvar - prior_logvar))


# ---------------------------------------------------------------------------------------------------------- stage one


def stats(
    recon: Tensor | None,
    target: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    log_sigma: Tensor | None,  # only where it varies inside a sample
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    free_bits: float,
) -> Tensor:
    """[3, B + 1]: S_i, KL_i, and Σ_k max(KL_ik, free_bits) of each sample; their sums over the batch at the end."""
    dtype = compute_dtype(recon, target, mu, logvar)
    x = recon if recon is not None else mu
    assert x is not None
    s = rate = clamped = torch.zeros_like(rows(x, dtype)[:, 0])  # of x, so that vmap maps it too
    if recon is not None and target is not None:
        e = rows(recon, dtype) - rows(target, dtype)
        if log_sigma is None:
            s = e.square().sum(1)
        else:
            ls = rows(log_sigma.expand(recon.shape), dtype)
            s = (e.square() * (-2 * ls).exp() + 2 * ls).sum(1)
    if mu is not None and logvar is not None:
        prior = [None if t is None else rows(t, dtype) for t in (prior_mu, prior_logvar)]
        kl = kl_elements(rows(mu, dtype), rows(logvar, dtype), *prior)
        rate, clamped = kl.sum(1), kl.clamp(min=free_bits).sum(1)
    each = torch.stack([s, rate, clamped])
    return torch.cat([each, each.sum(1, keepdim=True)], 1)


# ---------------------------------------------------------------------------------------------------------- stage two


def optimal_log_sigma(total: Tensor, n: float | Tensor, min_log_sigma: float, softclip: bool) -> Tensor:
    """½ log(total/n), bounded from below. S is clamped, not its logarithm, so that the gradient at 0 is 0, not NaN;
    `clamp` lets NaN through, so that a diverged model shows."""
    mse = total / n
    if softclip:
        x = 0.5 * torch.where(mse == 0, 1.0, mse).log() - min_log_sigma
        return min_log_sigma + torch.where(mse == 0, 0.0, F.softplus(x))
    return 0.5 * mse.clamp(min=math.exp(2 * min_log_sigma)).log()


def reduction_weight(reduction: int, batch: int | Tensor, dims: int | Tensor) -> float | Tensor:
    """What a sample's distortion and rate are multiplied by before they are summed."""
    return {BATCHMEAN: 1 / batch, SUM: 1.0, MEAN: 1 / (batch * dims), NONE: 1.0}[reduction]


def knob(tensor: Tensor | None, number: float | None, like: Tensor) -> Tensor:
    """The tensor, or the number where there is none."""
    return like.new_full((), number or 0.0) if tensor is None else tensor.to(like.dtype)


def dims_of(recon: Tensor | None, mu: Tensor | None) -> int:
    """D, by which "mean" divides; the latents' own number where there are no data (gaussian_kl)."""
    x = recon if recon is not None else mu
    assert x is not None
    return x.shape[1:].numel()


def elements(batch: int, d: int) -> float:
    """Of the batch. A float, since torch.func.jacrev cannot divide by the SymInt that a traced size is."""
    return cast(float, torch.sym_float(batch * d))


def forward(
    recon: Tensor | None,
    target: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    log_sigma: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    beta: Tensor | None,
    capacity: Tensor | None,
    sigma_mode: int,
    softclip: bool,
    log_sigma_value: float,
    min_log_sigma: float,
    free_bits: float,
    beta_value: float,
    capacity_value: float | None,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, distortion, rate, sigma, stats)."""
    element = log_sigma if sigma_mode == Kind.ELEMENT else None
    st = stats(recon, target, mu, logvar, element, prior_mu, prior_logvar, free_bits)
    s, _, kl_clamped = st[:, :-1].unbind(0)
    batch, dims = s.shape[0], dims_of(recon, mu)
    d = dims if recon is not None else 0
    r = reduction_weight(reduction, batch, dims)
    outputs = finalize(
        st, s.sum(), elements(batch, d), kl_clamped.mean(), d, r, log_sigma, beta, capacity,
        sigma_mode, softclip, log_sigma_value, min_log_sigma, beta_value, capacity_value, reduction,
    )  # fmt: skip
    return (*outputs, st)


def finalize(
    stats: Tensor,
    total: Tensor,  # ΣS of the batch that shares σ: these samples, or with them those of other processes
    n: float | Tensor,  # its number of elements
    mean_rate: Tensor,  # its mean rate, after free_bits: what capacity is held against
    d: int,
    r: float | Tensor,  # the weight of a sample
    log_sigma: Tensor | None,
    beta: Tensor | None,
    capacity: Tensor | None,
    sigma_mode: int,
    softclip: bool,
    log_sigma_value: float,
    min_log_sigma: float,
    beta_value: float,
    capacity_value: float | None,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, distortion, rate, sigma)."""
    s, kl, kl_clamped = stats[:, :-1].unbind(0)
    if sigma_mode == Kind.ELEMENT:
        distortion = 0.5 * s + 0.5 * d * LOG_2PI
        sigma = s.new_empty(0)
    else:
        if sigma_mode == Kind.BATCH:
            ls = optimal_log_sigma(total, n, min_log_sigma, softclip)
        elif sigma_mode == Kind.IMAGE:
            ls = optimal_log_sigma(s, d, min_log_sigma, softclip)
        else:
            ls = knob(log_sigma, log_sigma_value, s)
        distortion = 0.5 * s * (-2 * ls).exp() + d * (ls + 0.5 * LOG_2PI)
        sigma = ls.detach().exp()

    b = knob(beta, beta_value, s)
    if reduction == NONE:
        return distortion + b * kl_clamped, distortion, kl.clone(), sigma
    distortion = r * distortion.sum()
    if capacity is None and capacity_value is None:
        loss = distortion + r * (b * kl_clamped).sum()
    else:
        gap = mean_rate - knob(capacity, capacity_value, s)
        loss = distortion + r * s.shape[0] * b * gap.abs()
    return loss, distortion, r * kl.sum(), sigma


# -------------------------------------------------------------------------------------------------------- stage three


def inverse_variance(total: Tensor, n: float, min_log_sigma: float, softclip: bool) -> tuple[Tensor, Tensor]:
    """(1/σ², ∂ log σ / ∂ ½ log MSE) of an optimal σ. The slope is 0 at and below a hard floor, and at MSE = 0."""
    mse = total / n
    if softclip:
        x = 0.5 * torch.where(mse == 0, 1.0, mse).log() - min_log_sigma
        slope = torch.where(mse == 0, 0.0, torch.sigmoid(x))
        return (-2 * optimal_log_sigma(total, n, min_log_sigma, softclip)).exp(), slope
    floor = math.exp(2 * min_log_sigma)
    return 1 / mse.clamp(min=floor), (mse > floor).to(mse.dtype)


def grads(
    grad_loss: Tensor | None,
    grad_distortion: Tensor | None,
    grad_rate: Tensor | None,
    recon: Tensor | None,
    target: Tensor | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    log_sigma: Tensor | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    beta: Tensor | None,
    capacity: Tensor | None,
    stats: Tensor,
    sigma_mode: int,
    softclip: bool,
    log_sigma_value: float,
    min_log_sigma: float,
    free_bits: float,
    beta_value: float,
    capacity_value: float | None,
    reduction: int,
) -> Gradients:
    """The gradient of grad_loss·loss + grad_distortion·distortion + grad_rate·rate, each in its input's dtype."""
    s, _, kl_clamped = stats[:, :-1].unbind(0)
    batch, dims = s.shape[0], dims_of(recon, mu)
    r = reduction_weight(reduction, batch, dims)
    zero = s.new_zeros(batch)
    g_loss, g_distortion, g_rate = (
        zero if g is None else g.to(s.dtype).expand(batch) * r for g in (grad_loss, grad_distortion, grad_rate)
    )

    g_recon = g_target = g_log_sigma = None
    if recon is not None and target is not None:
        sigma_arguments = (log_sigma, s, sigma_mode, softclip, log_sigma_value, min_log_sigma)
        g_recon, g_target, g_log_sigma = _data_grads(g_loss + g_distortion, recon, target, *sigma_arguments)

    b = knob(beta, beta_value, s)
    pull = torch.ones_like(s[0])  # ∂(what β multiplies)/∂(mean of the clamped rate)
    g_beta = g_loss * kl_clamped
    if capacity is not None or capacity_value is not None:
        gap = kl_clamped.mean() - knob(capacity, capacity_value, s)
        pull, g_beta = gap.sign(), g_loss * gap.abs()  # summed over the batch below: B r |gap|
    g_mu = g_logvar = g_prior_mu = g_prior_logvar = None
    if mu is not None and logvar is not None:
        through_loss = g_loss * b * pull
        prior = (prior_mu, prior_logvar)
        gradients = _latent_grads(through_loss, g_rate, mu, logvar, *prior, free_bits, s.dtype)
        g_mu, g_logvar, g_prior_mu, g_prior_logvar = gradients
    g_beta = None if beta is None else g_beta.sum_to_size(beta.shape).to(beta.dtype)
    return Gradients(g_recon, g_target, g_mu, g_logvar, g_log_sigma, g_prior_mu, g_prior_logvar, g_beta)


def _data_grads(
    w: Tensor,  # [B]: ∂L/∂distortion_i
    recon: Tensor,
    target: Tensor,
    log_sigma: Tensor | None,
    s: Tensor,
    sigma_mode: int,
    softclip: bool,
    log_sigma_value: float,
    min_log_sigma: float,
) -> list[Tensor | None]:
    """[∂x̂, ∂x, ∂ log σ]."""
    batch, d = recon.shape[0], dims_of(recon, None)
    per_sample = (batch,) + (1,) * (recon.dim() - 1)
    e = recon.to(s.dtype) - target.to(s.dtype)
    g_log_sigma = None
    if sigma_mode == Kind.ELEMENT:
        assert log_sigma is not None
        scaled = e * (-2 * log_sigma.to(s.dtype)).exp()
        w = w.reshape(per_sample)
        g = w * scaled
        g_log_sigma = (w * (1 - e * scaled)).sum_to_size(log_sigma.shape)
    elif sigma_mode == Kind.GIVEN:
        ls = knob(log_sigma, log_sigma_value, s)
        inv_var = (-2 * ls).exp()
        g = (w * inv_var).reshape(per_sample) * e
        if log_sigma is not None:
            g_log_sigma = (w * (d - s * inv_var)).sum_to_size(log_sigma.shape)
    else:
        # σ depends on x̂ through the sum of squares: w_i e/σ² and, through log σ, slope · Σ_j w_j (D − S_j/σ²) e/ΣS.
        shared = sigma_mode == Kind.BATCH
        total = s.sum() if shared else s
        inv_var, slope = inverse_variance(total, elements(batch, d) if shared else d, min_log_sigma, softclip)
        through = w * (d - s * inv_var)
        through = through.sum() if shared else through
        through = slope * through / torch.where(total == 0, 1.0, total)
        g = (w * inv_var + through).reshape(per_sample) * e
    if g_log_sigma is not None and log_sigma is not None:
        g_log_sigma = g_log_sigma.to(log_sigma.dtype)
    return [g.to(recon.dtype), (-g).to(target.dtype), g_log_sigma]


def _latent_grads(
    through_loss: Tensor,  # [B]: reaches the elements that free_bits lets through
    through_rate: Tensor,  # [B]: reaches all
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    free_bits: float,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """[∂μ, ∂l, ∂μ_p, ∂l_p]."""
    per_sample = (mu.shape[0],) + (1,) * (mu.dim() - 1)
    m, l = mu.to(dtype), logvar.to(dtype)
    m_p, l_p = (None if t is None else t.to(dtype) for t in (prior_mu, prior_logvar))
    through_loss, through_rate = through_loss.reshape(per_sample), through_rate.reshape(per_sample)
    if free_bits > 0:
        through_loss = torch.where(kl_elements(m, l, m_p, l_p) >= free_bits, through_loss, 0.0)
    b = through_loss + through_rate
    if m_p is None or l_p is None or prior_mu is None or prior_logvar is None:
        return [(b * m).to(mu.dtype), (b * 0.5 * torch.expm1(l)).to(logvar.dtype), None, None]
    pull, stretch = (m - m_p) * (-l_p).exp(), torch.expm1(l - l_p)
    return [
        (b * pull).to(mu.dtype),
        (b * 0.5 * stretch).to(logvar.dtype),
        (-b * pull).to(prior_mu.dtype),
        (-0.5 * b * (stretch + pull * (m - m_p))).to(prior_logvar.dtype),
    ]
