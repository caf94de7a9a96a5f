"""The formulas in Triton, once: what `reference.py` says in PyTorch and `elbo_math.h` in C++.

Written for a tensor of fp32 or fp64 values. Launch with enable_fp_fusion=False: with contraction on, lanes of one short
row can differ by an ulp and then store different values to one address.
"""

import math

import triton
import triton.language as tl

LOG2_E, LOG_2, LOG_2PI = (tl.constexpr(x) for x in (1 / math.log(2), math.log(2), math.log(2 * math.pi)))
SIGMOID, TANH = tl.constexpr(1), tl.constexpr(2)  # as in fused_elbo/likelihood.py
BATCH_FREE_NATS, SAMPLE_FREE_NATS = tl.constexpr(3), tl.constexpr(4)  # as in fused_elbo/rate.py


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
def clamped(logvar, least, most):
    """l within [least, most]. NaN passes."""
    above = tl.where(logvar < least, least, logvar)
    return tl.where(above > most, most, above)


@triton.jit
def clamped_grad(of_logvar, logvar, least, most):
    """The gradient of l, from that of the clamped one: 0 outside, and NaN where l is NaN."""
    return tl.where((logvar < least) | (logvar > most), 0.0, of_logvar)


@triton.jit
def activated(y, KIND: tl.constexpr):
    """Returns x̂ and ∂x̂/∂y of the decoder's last pre-activation y. Neither cancels anywhere."""
    if KIND == SIGMOID:
        z = exp(-tl.abs(y))
        s = 1.0 / (1.0 + z)
        x, slope_of_x = tl.where(y < 0.0, z * s, s), z * s * s
    else:
        w = expm1(-2.0 * tl.abs(y))
        s = 1.0 / (w + 2.0)
        x, slope_of_x = tl.where(y < 0.0, w * s, -(w * s)), 4.0 * (w + 1.0) * s * s
    return x, slope_of_x


@triton.jit
def power(e, Q: tl.constexpr):
    """|e|^q"""
    if Q == 2:
        return e * e
    else:
        return tl.abs(e)


@triton.jit
def slope(e, Q: tl.constexpr):
    """∂(|e|^q/q)/∂e: e, or its sign, which is 0 at 0, and NaN for NaN."""
    if Q == 2:
        return e
    else:
        return tl.where(e > 0.0, 1.0, tl.where(e < 0.0, -1.0, e))


@triton.jit
def weighted(m, f):
    """m f: 0 where the weight m is 0, whatever f is."""
    return tl.where(m == 0.0, 0.0, m * f)


@triton.jit
def scaled_error(e, log_sigma, Q: tl.constexpr):
    """|e|^q/σ^q + q log σ: q times the distortion of one element, less the constant."""
    return power(e, Q) * exp(log_sigma * (-1.0 * Q)) + log_sigma * (1.0 * Q)


@triton.jit
def distortion_grad(w, e, log_sigma, Q: tl.constexpr):
    """Returns w/q times the gradient of `scaled_error` by e and log σ."""
    scaled = slope(e, Q) * exp(log_sigma * (-1.0 * Q))
    return w * scaled, w * (1.0 - e * scaled)


@triton.jit
def distortion(a, dims, log_sigma, inverse_scale, options):
    """−log p of a sample from A, its sum of |e|^q."""
    return a * (1.0 / options.Q) * inverse_scale + dims * (log_sigma + options.NATS_OF_ONE)


@triton.jit
def distortion_of_scaled(a, dims, options):
    """The same where σ varies inside a sample: A is Σ `scaled_error`, with every σ in it already."""
    return a * (1.0 / options.Q) + dims * options.NATS_OF_ONE


@triton.jit
def distortion_slope(a, dims, inverse_scale):
    """∂ distortion / ∂ log σ"""
    return dims - a * inverse_scale


@triton.jit
def limited(rate, limit, options):
    """What β multiplies in the place of a rate: max(K, λ), or |K − C|."""
    if options.LIMIT == BATCH_FREE_NATS or options.LIMIT == SAMPLE_FREE_NATS:
        return at_least(rate, limit)
    else:
        return tl.abs(rate - limit)


@triton.jit
def limited_slope(rate, limit, options):
    """∂ limited / ∂ rate"""
    if options.LIMIT == BATCH_FREE_NATS or options.LIMIT == SAMPLE_FREE_NATS:
        return tl.where(rate >= limit, 1.0, 0.0)
    else:
        return tl.where(rate > limit, 1.0, 0.0) - tl.where(rate < limit, 1.0, 0.0)


@triton.jit
def sigma_term(slope, grad_log_sigma, total):
    """Returns what a group's σ^q = total/n adds to the scale of its errors, through log σ."""
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
def optimal_sigma(total, n, least, options):
    """(log σ, 1/σ^q, ∂ log σ / ∂ (1/q) log mean) for σ^q = total/n, the mean of |e|^q, and log σ at least `least`.
    Where nothing has a weight, the mean is 0."""
    mean = total / tl.where(n == 0.0, 1.0, n)
    if options.SOFTCLIP:
        x = tl.log(tl.where(mean == 0.0, 1.0, mean)) * (1.0 / options.Q) - least
        log_sigma = least + tl.where(mean == 0.0, 0.0, softplus(x))
        return log_sigma, exp(log_sigma * (-1.0 * options.Q)), tl.where(mean == 0.0, 0.0, 1.0 / (1.0 + exp(-x)))
    else:
        floor = exp(least * (1.0 * options.Q) + 0.0 * mean)
        scale = at_least(mean, floor)
        return tl.log(scale) * (1.0 / options.Q), 1.0 / scale, tl.where(mean > floor, 1.0, 0.0)


@triton.jit
def exp_once(x):
    """exp by one exponential, where exp_reduced has three: exp2(x · log2 e), times what rounding took from that."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        power = x * 1.44269504  # in fp32 1.926e-8 less than log2 e
        lost = tl.fma(x, tl.full((), 1.44269504, tl.float32), -power) + x * 1.92596299e-8
        return tl.exp2(power) * (1.0 + LOG_2 * tl.where(tl.abs(lost) < 1.0, lost, 0.0))  # ∞ − ∞ is NaN


@triton.jit
def exp_of(difference):
    """exp of a difference of logarithms, which is as good as they are: one instruction on a GPU, where tl.exp's results
    below 1e-38 take three more."""
    if difference.dtype == tl.float64:
        return tl.exp(difference)
    else:
        return tl.exp2(difference * LOG2_E)


@triton.jit
def log_normal_terms(logvar):
    """Returns s and c of log N(z; μ, exp l) = s (z − μ)² + c."""
    return exp_once(-logvar) * -0.5, (logvar + LOG_2PI) * -0.5


@triton.jit
def log_normal(difference, scaled, constant):
    """scaled: s (z − μ). Rounded in the same way forward and backward: far from all components a rounding is whole
    nats, but not in the difference of two."""
    return tl.fma(scaled, difference, tl.broadcast_to(constant, scaled.shape))


@triton.jit
def log_normal_slopes(difference, scaled):
    """Returns ½ ∂/∂z of `log_normal`, which is −½ ∂/∂μ, and −∂/∂l."""
    return scaled, scaled * difference + 0.5


@triton.jit
def no_exp(shape: tl.constexpr, dtype: tl.constexpr):
    """Returns the (largest, sum) of no term at all. The largest is finite, so that −∞ less it is no NaN."""
    LOWEST: tl.constexpr = -1.7e308 if dtype == tl.float64 else -3.4e38
    return tl.full(shape, LOWEST, dtype), tl.zeros(shape, dtype)


@triton.jit
def add_exp(largest, sum, x):
    """Adds exp(x) to exp(largest) · sum, by one exponential: it scales what is the smaller. NaN stays in the sum."""
    difference = x - largest
    scale = exp_of(-tl.abs(difference))
    grows = difference > 0.0
    sum = tl.fma(sum, tl.where(grows, scale, 1.0), tl.where(grows, 1.0, scale))
    return tl.where(grows, x, largest), sum


@triton.jit
def sum_exp(x, AXIS: tl.constexpr):
    """Returns (largest, sum) of all exp(x) along an axis."""
    lowest, _ = no_exp((1,), x.dtype)
    largest = tl.maximum(tl.max(x, AXIS), lowest)
    return largest, tl.sum(exp_of(x - tl.expand_dims(largest, AXIS)), AXIS)


@triton.jit
def merged_exp(largest, sum, AXIS: tl.constexpr):
    """Returns the (largest, sum) of those along an axis."""
    of_all = tl.max(largest, AXIS)
    return of_all, tl.sum(sum * exp_of(largest - tl.expand_dims(of_all, AXIS)), AXIS)
