"""What S and KL of a sample mean for its elements: its σ, and one factor for each gradient. Where σ is shared within a
sample, a mode of σ is added here."""

import triton
import triton.language as tl

from ._math import distortion_slope, exp, number, optimal_sigma, sigma_term
from .structs import Factors, Sums

GIVEN, BATCH, IMAGE, ELEMENT = (tl.constexpr(k) for k in range(4))  # as in fused_elbo/sigma.py


@triton.jit
def value_of(scalar, ACC: tl.constexpr):
    """Returns the value of a `structs.Scalar` that is one for all samples."""
    if scalar.tensor is not None:
        value = tl.load(scalar.tensor).to(ACC)
    else:
        value = number(scalar.value, ACC)
    return value


@triton.jit
def values_of(scalar, rows, batch):
    """Returns the values of a `structs.Scalar`, one for each sample, or 0 where there is none."""
    if scalar.value is None:
        values = (rows * 0).to(batch.ACC)
    elif scalar.tensor is None:
        values = (rows * 0).to(batch.ACC) + number(scalar.value, batch.ACC)
    elif scalar.stride is None:
        values = tl.load(scalar.tensor + rows * 0, rows < batch.size, 0.0).to(batch.ACC)
    else:
        values = tl.load(scalar.tensor + rows * scalar.stride, rows < batch.size, 0.0).to(batch.ACC)
    return values


@triton.jit
def shared_sigma(total, opts, batch):
    """Returns (log σ, 1/σ², slope) for the σ that the batch shares."""
    n = number(batch.n, batch.ACC) * number(batch.dims, batch.ACC)
    return optimal_sigma(total, n, number(opts.min_log_sigma, batch.ACC), opts.SOFTCLIP)


@triton.jit
def sigma_of(rows, s, total, opts, batch):
    """Returns (log σ, 1/σ², slope) of each sample of a block."""
    if opts.MODE == BATCH:
        return shared_sigma((rows * 0).to(batch.ACC) + total, opts, batch)
    elif opts.MODE == IMAGE:
        least = number(opts.min_log_sigma, batch.ACC)
        return optimal_sigma(s, number(batch.dims, batch.ACC), least, opts.SOFTCLIP)
    else:
        given = values_of(opts.log_sigma, rows, batch)
        return given, exp(-2.0 * given), s * 0.0


@triton.jit
def one_sigma(total, opts, batch):
    """Returns (log σ, 1/σ²) where they are the same for all samples."""
    if opts.MODE == BATCH:
        ls, inverse, _ = shared_sigma(total, opts, batch)
    else:
        ls = value_of(opts.log_sigma, batch.ACC)
        inverse = exp(-2.0 * ls)
    return ls, inverse


@triton.jit
def capacity_gap(clamped_total, opts, batch):
    """Returns by how much the mean of the clamped KL exceeds the capacity."""
    return clamped_total / number(batch.n, batch.ACC) - value_of(opts.capacity, batch.ACC)


@triton.jit
def sample_sums(stats, rows, batch):
    """Reads the `structs.Sums` of a block of samples from stats."""
    clamped = stats + 2 * (batch.size + 1)
    return Sums(
        tl.load(stats + rows, rows < batch.size, 0.0), tl.load(stats + batch.size),
        tl.load(clamped + rows, rows < batch.size, 0.0), tl.load(clamped + batch.size),
    )  # fmt: skip


@triton.jit
def factors(rows, sums, opts, grad_outputs, batch):
    """Returns the `structs.Factors` of a block of samples."""
    d, r = number(batch.dims, batch.ACC), number(batch.scale, batch.ACC)
    g = r * values_of(grad_outputs.loss, rows, batch)
    w = g + r * values_of(grad_outputs.distortion, rows, batch)
    grad_kl = r * values_of(grad_outputs.rate, rows, batch)
    grad_kl_clamped = g * values_of(opts.beta, rows, batch)
    of_beta = g * sums.clamped
    if opts.capacity.value is not None:
        gap = capacity_gap(sums.clamped_total, opts, batch)
        grad_kl_clamped = grad_kl_clamped * (tl.where(gap > 0, 1.0, 0.0) - tl.where(gap < 0, 1.0, 0.0))
        of_beta = g * tl.abs(gap)

    recon_scale, of_log_sigma = w, w * 0.0
    if opts.MODE != ELEMENT:
        _, inverse, slope = sigma_of(rows, sums.s, sums.total, opts, batch)
        of_log_sigma = w * distortion_slope(sums.s, d, inverse)
        recon_scale = w * inverse
        if opts.MODE == IMAGE:
            recon_scale += sigma_term(slope, of_log_sigma, sums.s)
        if opts.MODE == BATCH:
            if grad_outputs.shared_sigma_term is not None:
                recon_scale += tl.load(grad_outputs.shared_sigma_term)
            else:  # equal weights
                n = number(batch.n, batch.ACC)
                recon_scale += sigma_term(slope, w * distortion_slope(sums.total, n * d, inverse), sums.total)
    return Factors(recon_scale, grad_kl_clamped, grad_kl, of_log_sigma, of_beta)
