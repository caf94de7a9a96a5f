"""The formulas, in plain PyTorch. No other file of fused_elbo/ has one.

Notation: e = x̂ − x, D data dimensions of a sample, l = log σ_z²; q the likelihood's exponent, 2 for Gaussian and 1 for
Laplace; A = Σ_d |e|^q; σ its scale.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import BATCHMEAN, MEAN, NONE, SUM, Options
from ..likelihood import Activation
from ..rate import is_floor

LOG_2PI = math.log(2 * math.pi)
LOG_2 = math.log(2)


def expm1mx(t: Tensor) -> Tensor:
    """exp(t) − 1 − t, which is t²/2 near 0, where the literal formula (and expm1(t) − t) has cancelled."""
    near = t.abs() < 0.5
    small = torch.where(near, t, 0.0)  # far out the series would overflow, and its NaN reach the second derivative
    series = torch.ones_like(t)
    last = 18 if t.dtype == torch.float64 else 9
    for n in range(last, 2, -1):  # t²/2 (1 + t/3 (1 + t/4 (… )))
        series = 1 + series * small / n
    return torch.where(near, 0.5 * small * small * series, t.exp() - 1 - t)


def scalar(tensor: Tensor | None, number: float, like: Tensor) -> Tensor:
    """The tensor, or the number where there is none."""
    return like.new_full((), number) if tensor is None else tensor.to(like.dtype)


# ------------------------------------------------------------------------------------------------------------ the rate


def kl(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
    """½[(μ − μ_p)²/σ_p² + exp(t) − 1 − t], t = l − l_p, elementwise; the standard normal prior is μ_p = l_p = 0."""
    if prior_mu is None or prior_logvar is None:
        return 0.5 * (mu.square() + expm1mx(logvar))
    return 0.5 * ((mu - prior_mu).square() * (-prior_logvar).exp() + expm1mx(logvar - prior_logvar))


class KLGrad(NamedTuple):
    """∂KL/∂ each of its arguments; those of the prior are None where it is the standard normal."""

    mu: Tensor
    logvar: Tensor
    prior_mu: Tensor | None
    prior_logvar: Tensor | None


def kl_grad(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> KLGrad:
    if prior_mu is None or prior_logvar is None:
        return KLGrad(mu, 0.5 * torch.expm1(logvar), None, None)
    difference = mu - prior_mu
    dkl_dmu, expm1_dlogvar = difference * (-prior_logvar).exp(), torch.expm1(logvar - prior_logvar)
    return KLGrad(dkl_dmu, 0.5 * expm1_dlogvar, -dkl_dmu, -0.5 * (expm1_dlogvar + dkl_dmu * difference))


def clamped(logvar: Tensor, options: Options) -> Tensor:
    """l within its range. NaN passes."""
    return logvar if options.logvar_min is None else logvar.clamp(options.logvar_min, options.logvar_max)


def clamped_grad(of_logvar: Tensor, logvar: Tensor, options: Options) -> Tensor:
    """The gradient of l, from that of the clamped one: 0 outside, and NaN where l is NaN."""
    if options.logvar_min is None or options.logvar_max is None:
        return of_logvar
    return torch.where((logvar < options.logvar_min) | (logvar > options.logvar_max), 0.0, of_logvar)


def limited(rate: Tensor, limit: Tensor, options: Options) -> Tensor:
    """What β multiplies in the place of a rate: max(K, λ), or |K − C|. `maximum` lets NaN through."""
    return torch.maximum(rate, limit) if is_floor(options.limit_mode) else (rate - limit).abs()


def limited_slope(rate: Tensor, limit: Tensor, options: Options) -> Tensor:
    """∂ limited/∂ rate. At K = λ it is 1, as `clamp` has it."""
    return (rate >= limit).to(rate.dtype) if is_floor(options.limit_mode) else (rate - limit).sign()


# --------------------------------------------------------------------------------------------- the aggregate posterior


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; μ, exp l), elementwise. In this form, and not multiplied out, since z² − 2zμ + μ² cancels."""
    return -0.5 * ((z - mu).square() * (-logvar).exp() + logvar + LOG_2PI)


class LogNormalGrad(NamedTuple):
    z: Tensor
    mu: Tensor
    logvar: Tensor


def log_normal_grad(z: Tensor, mu: Tensor, logvar: Tensor) -> LogNormalGrad:
    difference = z - mu
    scaled = difference * (-logvar).exp()
    return LogNormalGrad(-scaled, scaled, 0.5 * (scaled * difference - 1))


def mixture_weights(components: int, has_own: bool, dataset_size: int | None) -> tuple[float, float]:
    """w of the component that z was drawn from, and of each other one: 1/N and (N − 1)/(N (M − 1)). So the other M − 1
    stand for the other N − 1 of the data set, and the weights sum to 1. Without either, all are 1/M."""
    size = components if dataset_size is None or not has_own else dataset_size
    if components == 1:  # never of a size that is open
        return 1 / size, 1 / size
    return 1 / size, (size - 1) / (size * (components - 1))


def mixture_log_weights(components: int, has_own: bool, dataset_size: int | None) -> tuple[float, float]:
    of_own, of_others = mixture_weights(components, has_own, dataset_size)
    return math.log(of_own), math.log(of_others)


# ---------------------------------------------------------------------------------------------------------- the errors


def activated(y: Tensor, options: Options) -> Tensor:
    """x̂ of the decoder's last pre-activation."""
    if options.activation == Activation.SIGMOID:
        return torch.sigmoid(y)
    return torch.tanh(y) if options.activation == Activation.TANH else y


def activation_slope(y: Tensor, options: Options) -> Tensor | None:
    """∂x̂/∂y, without the cancellation of x̂ (1 − x̂) where x̂ is close to 1. None: it is 1."""
    if options.activation == Activation.SIGMOID:
        return torch.sigmoid(y) * torch.sigmoid(-y)
    if options.activation == Activation.TANH:
        return 4 * torch.sigmoid(2 * y) * torch.sigmoid(-2 * y)
    return None


def scaled_target(target: Tensor, dtype: torch.dtype, options: Options) -> Tensor:
    """x: the target, of which bytes stand for target_low … target_high."""
    if target.dtype != torch.uint8:
        return target.to(dtype)
    return target.to(dtype) * ((options.target_high - options.target_low) / 255) + options.target_low


def power(error: Tensor, exponent: int) -> Tensor:
    """|e|^q"""
    return error.square() if exponent == 2 else error * slope(error, exponent)


def slope(error: Tensor, exponent: int) -> Tensor:
    """∂(|e|^q/q)/∂e: e, or its sign, which is 0 at 0 and NaN for NaN, where PyTorch's own gradient of |e| is 0."""
    if exponent == 2:
        return error
    constant = error.detach()
    return torch.where(constant > 0, 1.0, torch.where(constant < 0, -1.0, constant))


def scaled_error(error: Tensor, log_sigma: Tensor, exponent: int) -> Tensor:
    """|e|^q/σ^q + q log σ, elementwise: what A adds up where σ varies inside a sample."""
    return power(error, exponent) * (-exponent * log_sigma).exp() + exponent * log_sigma


def scaled_error_grad(error: Tensor, log_sigma: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """Its derivatives by e and by log σ, over q."""
    inverse = (-exponent * log_sigma).exp()
    return slope(error, exponent) * inverse, 1 - power(error, exponent) * inverse


# ------------------------------------------------------------------------------------------------------ the distortion


def nats_of_one(options: Options) -> float:
    """What an element of error 0 costs where σ is 1: ½ log 2π, or log 2."""
    return (0.5 * LOG_2PI if options.exponent == 2 else LOG_2) if options.constant else 0.0


def distortion(a: Tensor, log_sigma: Tensor | None, dims: float | Tensor, options: Options) -> Tensor:
    """A/(q σ^q) + D (log σ + const) of each sample; without a log_sigma, σ is in A already."""
    q, constant = options.exponent, nats_of_one(options)
    if log_sigma is None:
        return a / q + dims * constant
    return a / q * (-q * log_sigma).exp() + dims * (log_sigma + constant)


def distortion_slope(a: Tensor, dims: float | Tensor, inverse_scale: Tensor) -> Tensor:
    """∂ distortion/∂ log σ: D − A/σ^q."""
    return dims - a * inverse_scale


def optimal_log_sigma(total: Tensor, n: float | Tensor, options: Options) -> Tensor:
    """(1/q) log(total/n), bounded from below. A is clamped, not its logarithm, so that the gradient at 0 is 0, not NaN;
    `clamp` lets NaN through, so that a diverged model shows."""
    mean, q = mean_error(total, n), options.exponent
    if options.softclip:
        x = torch.where(mean == 0, 1.0, mean).log() / q - options.min_log_sigma
        return options.min_log_sigma + torch.where(mean == 0, 0.0, F.softplus(x))
    return mean.clamp(min=math.exp(q * options.min_log_sigma)).log() / q


def optimal_sigma_grad(total: Tensor, n: float | Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(1/σ^q, ∂ log σ / ∂ (1/q) log mean) of an optimal σ. The slope is 0 at and below a hard floor, and where the mean
    is 0."""
    mean, q = mean_error(total, n), options.exponent
    if options.softclip:
        x = torch.where(mean == 0, 1.0, mean).log() / q - options.min_log_sigma
        of_mean = torch.where(mean == 0, 0.0, torch.sigmoid(x))
        return (-q * optimal_log_sigma(total, n, options)).exp(), of_mean
    floor = math.exp(q * options.min_log_sigma)
    return 1 / mean.clamp(min=floor), (mean > floor).to(mean.dtype)


def mean_error(total: Tensor, n: float | Tensor) -> Tensor:
    """The mean of |e|^q; 0 where nothing has a weight."""
    return total / (torch.where(n == 0, 1.0, n) if isinstance(n, Tensor) else n)


def sigma_term(slope: Tensor, of_log_sigma: Tensor, total: Tensor) -> Tensor:
    """What reaches an error through an optimal σ, which depends on x̂ through the sum `total` alone."""
    return slope * of_log_sigma / torch.where(total == 0, 1.0, total)


# ----------------------------------------------------------------------------------------------------------- the batch


def reduction_weight(
    reduction: int, batch: int | Tensor, dims: int | Tensor, elements: Tensor | None = None
) -> float | Tensor:
    """What a sample's distortion and rate are multiplied by before they are summed. elements: the sum of the weights,
    where there are any; "mean" divides by it, and by batch · dims where it is 0."""
    if reduction == MEAN and elements is not None:
        return 1 / torch.where(elements == 0, batch * dims, elements)
    return {BATCHMEAN: 1 / batch, SUM: 1.0, MEAN: 1 / (batch * dims), NONE: 1.0}[reduction]


def elements(batch: int, dims: int) -> float:
    """How many the batch has. A float, since torch.func.jacrev cannot divide by the SymInt that a traced size is."""
    return cast(float, torch.sym_float(batch * dims))
