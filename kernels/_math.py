"""The formulas in Triton, once: what `reference.py` says in PyTorch and `elbo_math.h` in C++.

Written for a tensor of fp32 or fp64 values. Launch with enable_fp_fusion=False: with contraction on, lanes of one short
row can differ by an ulp and then store different values to one address.
"""

import triton
import triton.language as tl

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)


@triton.jit
def number(value, dtype: tl.constexpr):
    """Returns a `structs.Number` in the compute type. (In the interpreter its floats are still Python's.)"""
    if dtype == tl.float64:
        high = tl.full((), value.high, tl.float32).to(tl.int64) << 40
        middle = tl.full((), value.middle, tl.float32).to(tl.int64) << 16
        return (high | middle | tl.full((), value.low, tl.float32).to(tl.int64)).to(tl.float64, bitcast=True)
    else:
        return tl.full((), value, dtype)


@triton.jit
def whole(n):
    """Returns what `structs.whole` was given."""
    return (n - 3) >> 1


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
def expm1mx_series(t):
    """1 + t/3 (1 + t/4 (1 + …)), so that exp(t) − 1 − t = t²/2 · series; exact to rounding for |t| < ½."""
    LAST: tl.constexpr = 18 if t.dtype == tl.float64 else 9
    series = t * 0.0 + 1.0
    for k in tl.static_range(LAST - 2):
        series = 1.0 + series * t * (1.0 / (LAST - k))
    return series


@triton.jit
def expm1mx(t):
    """exp(t) − 1 − t. Near 0 it is t²/2, where the literal formula has cancelled."""
    return tl.where(tl.abs(t) < 0.5, 0.5 * t * t * expm1mx_series(t), exp(t) - 1.0 - t)


@triton.jit
def expm1(t):
    return tl.where(tl.abs(t) < 0.5, t + 0.5 * t * t * expm1mx_series(t), exp(t) - 1.0)


@triton.jit
def kl(d, t, inverse_prior_variance):
    """KL of one element: d = μ − μ_p, t = l − l_p; against N(0, I) μ, l and 1."""
    return 0.5 * (d * d * inverse_prior_variance + expm1mx(t))


@triton.jit
def kl_grad(b, d, t, inverse_prior_variance):
    """Returns b times the gradient of `kl` by μ, l, μ_p and l_p."""
    dkl_dmu, expm1_dlogvar = d * inverse_prior_variance, expm1(t)
    return b * dkl_dmu, b * 0.5 * expm1_dlogvar, -(b * dkl_dmu), -0.5 * b * (expm1_dlogvar + dkl_dmu * d)


@triton.jit
def scaled_error(e, log_sigma):
    """e²/σ² + 2 log σ: twice the distortion of one element, less log 2π."""
    return e * e * exp(-2.0 * log_sigma) + 2.0 * log_sigma


@triton.jit
def distortion_grad(w, e, log_sigma):
    """Returns w times the gradient of ½ `scaled_error` by e and log σ."""
    scaled = e * exp(-2.0 * log_sigma)
    return w * scaled, w * (1.0 - e * scaled)


@triton.jit
def distortion(s, dims, log_sigma, inverse_variance):
    """−log p of a sample from its sum of squares."""
    return 0.5 * s * inverse_variance + dims * (log_sigma + HALF_LOG_2PI)


@triton.jit
def distortion_of_scaled(s, dims):
    """The same where σ varies inside a sample: s is Σ `scaled_error`, with every σ in it already."""
    return 0.5 * s + dims * HALF_LOG_2PI


@triton.jit
def distortion_slope(s, dims, inverse_variance):
    """∂ distortion / ∂ log σ"""
    return dims - s * inverse_variance


@triton.jit
def sigma_term(slope, grad_log_sigma, total):
    """Returns what a group's σ² = MSE = total/n adds to the scale of its errors: ∂L/∂ log σ · ∂ log σ/∂e, over e."""
    return slope * grad_log_sigma / tl.where(total == 0.0, 1.0, total)


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
def optimal_sigma(total, n, least, SOFTCLIP: tl.constexpr):
    """(log σ, 1/σ², ∂ log σ / ∂ ½ log MSE) for σ² = MSE = total/n, and log σ at least `least`."""
    mse = total / n
    if SOFTCLIP:
        x = 0.5 * tl.log(tl.where(mse == 0.0, 1.0, mse)) - least
        log_sigma = least + tl.where(mse == 0.0, 0.0, softplus(x))
        return log_sigma, exp(-2.0 * log_sigma), tl.where(mse == 0.0, 0.0, 1.0 / (1.0 + exp(-x)))
    else:
        floor = exp(2.0 * least + 0.0 * mse)
        variance = at_least(mse, floor)
        return 0.5 * tl.log(variance), 1.0 / variance, tl.where(mse > floor, 1.0, 0.0)
