"""The formulas, in plain PyTorch. No other file of fused_elbo/ has one.

Notation: e = x̂ − x, D data dimensions of a sample, l = log σ_z², S = Σ_d e².
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import BATCHMEAN, MEAN, NONE, SUM, Options

LOG_2PI = math.log(2 * math.pi)


def expm1mx(t: Tensor) -> Tensor:
    """exp(t) − 1 − t, which is t²/2 near 0, where the literal formula (and expm1(t) − t) has cancelled."""
    near = t.abs() < 0.5
    small = torch.where(near, t, 0.0)  # far out the series would overflow, and its NaN reach the second derivative
    series = torch.ones_like(t)
    last = 18 if t.dtype == torch.float64 else 9
    for n in range(last, 2, -1):  # t²/2 (1 + t/3 (1 + t/4 (… )))
        series = 1 + series * small / n
    return torch.where(near, 0.5 * small * small * series, t.exp() - 1 - t)


def scalar(tensor: Tensor | None, number: float | None, like: Tensor) -> Tensor:
    """The tensor, or the number where there is none."""
    return like.new_full((), number or 0.0) if tensor is None else tensor.to(like.dtype)


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


# ------------------------------------------------------------------------------------------------------ the distortion


def scaled_error(error: Tensor, log_sigma: Tensor) -> Tensor:
    """e²/σ² + 2 log σ, elementwise: what S adds up where σ varies inside a sample."""
    return error.square() * (-2 * log_sigma).exp() + 2 * log_sigma


def scaled_error_grad(error: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Half its derivatives by e and by log σ: (e/σ², 1 − e²/σ²)."""
    scaled = error * (-2 * log_sigma).exp()
    return scaled, 1 - error * scaled


def distortion(s: Tensor, log_sigma: Tensor | None, dims: int) -> Tensor:
    """Σ_d [e²/(2σ²) + ½ log(2πσ²)] of each sample; without a log_sigma, σ is in s already."""
    if log_sigma is None:
        return 0.5 * s + 0.5 * dims * LOG_2PI
    return 0.5 * s * (-2 * log_sigma).exp() + dims * (log_sigma + 0.5 * LOG_2PI)


def distortion_slope(s: Tensor, dims: int, inverse_variance: Tensor) -> Tensor:
    """∂ distortion/∂ log σ: D − S/σ²."""
    return dims - s * inverse_variance


def optimal_log_sigma(total: Tensor, n: float | Tensor, options: Options) -> Tensor:
    """½ log(total/n), bounded from below. S is clamped, not its logarithm, so that the gradient at 0 is 0, not NaN;
    `clamp` lets NaN through, so that a diverged model shows."""
    mse = total / n
    if options.softclip:
        x = 0.5 * torch.where(mse == 0, 1.0, mse).log() - options.min_log_sigma
        return options.min_log_sigma + torch.where(mse == 0, 0.0, F.softplus(x))
    return 0.5 * mse.clamp(min=math.exp(2 * options.min_log_sigma)).log()


def optimal_sigma_grad(total: Tensor, n: float | Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(1/σ², ∂ log σ / ∂ ½ log MSE) of an optimal σ. The slope is 0 at and below a hard floor, and at MSE = 0."""
    mse = total / n
    if options.softclip:
        x = 0.5 * torch.where(mse == 0, 1.0, mse).log() - options.min_log_sigma
        slope = torch.where(mse == 0, 0.0, torch.sigmoid(x))
        return (-2 * optimal_log_sigma(total, n, options)).exp(), slope
    floor = math.exp(2 * options.min_log_sigma)
    return 1 / mse.clamp(min=floor), (mse > floor).to(mse.dtype)


def sigma_term(slope: Tensor, of_log_sigma: Tensor, total: Tensor) -> Tensor:
    """What reaches an error through an optimal σ, which depends on x̂ through the sum of squares `total` alone."""
    return slope * of_log_sigma / torch.where(total == 0, 1.0, total)


# ----------------------------------------------------------------------------------------------------------- the batch


def reduction_weight(reduction: int, batch: int | Tensor, dims: int | Tensor) -> float | Tensor:
    """What a sample's distortion and rate are multiplied by before they are summed."""
    return {BATCHMEAN: 1 / batch, SUM: 1.0, MEAN: 1 / (batch * dims), NONE: 1.0}[reduction]


def elements(batch: int, dims: int) -> float:
    """How many the batch has. A float, since torch.func.jacrev cannot divide by the SymInt that a traced size is."""
    return cast(float, torch.sym_float(batch * dims))
