"""The formulas in Triton, once: what `reference.py` says in PyTorch and `elbo_math.h` in C++.

Written for a tensor of fp32 or fp64 values. Launch with enable_fp_fusion=False: with contraction on, lanes of one short
row can differ by an ulp and then store different values to one address.
"""

import triton
import triton.language as tl

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)


@triton.jit
def number(value, ACC: tl.constexpr):
    """A Python float, passed as fp64, in the compute type. (In the interpreter it is still a Python float.)"""
    return tl.full((), value, tl.float64).to(ACC)


@triton.jit
def exp_reduced(x):
    """tl.exp of fp32 is exp2(x · log2 e), whose error grows with |x|; here the argument is reduced first: 2ⁿ exp(r)."""
    n = tl.floor(x * 1.44269504 + 0.5)
    r = (x - n * 0.693359375) - n * -2.12194440e-4  # log 2 in two parts, the first exact times n
    half = tl.floor(n * 0.5)  # 2ⁿ in two factors, for n reaches 128 and −150
    scaled = tl.exp(r) * tl.exp2(half) * tl.exp2(n - half)
    scaled = tl.where(x < -104.0, 0.0, scaled)  # −inf − (−inf) above is NaN
    return tl.where(x > 89.0, float("inf"), scaled)


@triton.jit
def exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return exp_reduced(x)


@triton.jit
def excess_series(t):
    """1 + t/3 (1 + t/4 (1 + …)), so that exp(t) − 1 − t = t²/2 · series; exact to rounding for |t| < ½."""
    LAST: tl.constexpr = 18 if t.dtype == tl.float64 else 9
    series = t * 0.0 + 1.0
    for k in tl.static_range(LAST - 2):
        series = 1.0 + series * t * (1.0 / (LAST - k))
    return series


@triton.jit
def excess(t):
    """exp(t) − 1 − t. Near 0 it is t²/2, where the literal formula has cancelled."""
    return tl.where(tl.abs(t) < 0.5, 0.5 * t * t * excess_series(t), exp(t) - 1.0 - t)


@triton.jit
def expm1(t):
    return tl.where(tl.abs(t) < 0.5, t + 0.5 * t * t * excess_series(t), exp(t) - 1.0)


@triton.jit
def kl(d, t, inverse_prior_variance):
    """KL of one element: d = μ − μ_p, t = l − l_p; against N(0, I) μ, l and 1."""
    return 0.5 * (d * d * inverse_prior_variance + excess(t))


@triton.jit
def at_least(x, floor):
    """NaN passes: tl.maximum would return the floor, and hide a diverged model."""
    return tl.where(x < floor, floor, x)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) for any x. Where exp(−|x|) is small, 1 + it would lose its digits."""
    small = exp(-tl.abs(x))
    return at_least(x, 0.0) + tl.where(small < 1e-4, small * (1.0 - 0.5 * small), tl.log(1.0 + small))


@triton.jit
def optimal_sigma(total, n, min_log_sigma, SOFTCLIP: tl.constexpr):
    """(log σ, 1/σ², ∂ log σ / ∂ ½ log MSE) for σ² = MSE = total/n, bounded from below."""
    mse = total / n
    if SOFTCLIP:
        x = 0.5 * tl.log(tl.where(mse == 0.0, 1.0, mse)) - min_log_sigma
        log_sigma = min_log_sigma + tl.where(mse == 0.0, 0.0, softplus(x))
        return log_sigma, exp(-2.0 * log_sigma), tl.where(mse == 0.0, 0.0, 1.0 / (1.0 + exp(-x)))
    else:
        floor = exp(2.0 * min_log_sigma + 0.0 * mse)
        variance = at_least(mse, floor)
        return 0.5 * tl.log(variance), 1.0 / variance, tl.where(mse > floor, 1.0, 0.0)
