"""What S and KL of a sample mean for its elements: its σ, and one factor for each gradient. Where σ is shared within a
sample, a mode of σ is added here."""

import triton
import triton.language as tl

from ._elements import size
from ._math import distortion_slope, exp, number, optimal_sigma, sigma_term, whole
from .structs import Factors, Sums

GIVEN, BATCH, IMAGE, ELEMENT = (tl.constexpr(k) for k in range(4))  # as in fused_elbo/sigma.py


@triton.jit
def value_of(tensor, value, ACC: tl.constexpr):
    """Returns one value for all samples: a tensor's, or where there is none a number."""
    if tensor is not None:
        found = tl.load(tensor).to(ACC)
    else:
        found = number(value, ACC)
    return found


@triton.jit
def values_of(tensor, value, scalar, rows, call):
    """Returns a value for each sample, or 0 where there is none. `scalar`: a `structs.Scalar`."""
    if scalar.PRESENT is None:
        values = (rows * 0).to(call.batch.ACC)
    elif tensor is None:
        values = (rows * 0).to(call.batch.ACC) + number(value, call.batch.ACC)
    elif scalar.stride is None:
        values = tl.load(tensor + rows * 0, rows < size(call), 0.0).to(call.batch.ACC)
    else:
        values = tl.load(tensor + rows * whole(scalar.stride), rows < size(call), 0.0).to(call.batch.ACC)
    return values


@triton.jit
def one_beta(call):
    return value_of(call.tensors.beta, call.numbers.beta, call.batch.ACC)


@triton.jit
def betas(rows, call):
    return values_of(call.tensors.beta, call.numbers.beta, call.options.beta, rows, call)


@triton.jit
def shared_sigma(total, call):
    """Returns (log σ, 1/σ², slope) for the σ that the batch shares."""
    n = number(call.batch.n, call.batch.ACC) * number(call.batch.dims, call.batch.ACC)
    return optimal_sigma(total, n, number(call.numbers.min_log_sigma, call.batch.ACC), call.options.SOFTCLIP)


@triton.jit
def sigma_of(rows, s, total, call):
    """Returns (log σ, 1/σ², slope) of each sample of a block."""
    if call.options.MODE == BATCH:
        return shared_sigma((rows * 0).to(call.batch.ACC) + total, call)
    elif call.options.MODE == IMAGE:
        least = number(call.numbers.min_log_sigma, call.batch.ACC)
        return optimal_sigma(s, number(call.batch.dims, call.batch.ACC), least, call.options.SOFTCLIP)
    else:
        given = values_of(call.tensors.log_sigma, call.numbers.log_sigma, call.options.log_sigma, rows, call)
        return given, exp(-2.0 * given), s * 0.0


@triton.jit
def one_sigma(total, call):
    """Returns (log σ, 1/σ²) where they are the same for all samples."""
    if call.options.MODE == BATCH:
        ls, inverse, _ = shared_sigma(total, call)
    else:
        ls = value_of(call.tensors.log_sigma, call.numbers.log_sigma, call.batch.ACC)
        inverse = exp(-2.0 * ls)
    return ls, inverse


@triton.jit
def capacity_gap(clamped_total, call):
    """Returns by how much the mean of the clamped KL exceeds the capacity."""
    capacity = value_of(call.tensors.capacity, call.numbers.capacity, call.batch.ACC)
    return clamped_total / number(call.batch.n, call.batch.ACC) - capacity


@triton.jit
def sample_sums(stats, rows, call):
    """Reads the `structs.Sums` of a block of samples from stats."""
    clamped = stats + 2 * (size(call) + 1)
    return Sums(
        tl.load(stats + rows, rows < size(call), 0.0), tl.load(stats + size(call)),
        tl.load(clamped + rows, rows < size(call), 0.0), tl.load(clamped + size(call)),
    )  # fmt: skip


@triton.jit
def factors(rows, sums, given, call):
    """Returns the `structs.Factors` of a block of samples. `given`: the `structs.GradOutputs`."""
    d, r = number(call.batch.dims, call.batch.ACC), number(call.batch.scale, call.batch.ACC)
    g = r * values_of(given.loss, call.numbers.grad_scale, call.grad_outputs.loss, rows, call)
    w = g + r * values_of(given.distortion, call.numbers.grad_scale, call.grad_outputs.distortion, rows, call)
    grad_kl = r * values_of(given.rate, call.numbers.grad_scale, call.grad_outputs.rate, rows, call)
    grad_kl_clamped = g * betas(rows, call)
    of_beta = g * sums.clamped
    if call.options.capacity.PRESENT is not None:
        gap = capacity_gap(sums.clamped_total, call)
        grad_kl_clamped = grad_kl_clamped * (tl.where(gap > 0, 1.0, 0.0) - tl.where(gap < 0, 1.0, 0.0))
        of_beta = g * tl.abs(gap)

    recon_scale, of_log_sigma = w, w * 0.0
    if call.options.MODE != ELEMENT:
        _, inverse, slope = sigma_of(rows, sums.s, sums.total, call)
        of_log_sigma = w * distortion_slope(sums.s, d, inverse)
        recon_scale = w * inverse
        if call.options.MODE == IMAGE:
            recon_scale += sigma_term(slope, of_log_sigma, sums.s)
        if call.options.MODE == BATCH:
            if given.shared_sigma_term is not None:
                recon_scale += tl.load(given.shared_sigma_term)
            else:  # equal weights
                n = number(call.batch.n, call.batch.ACC)
                recon_scale += sigma_term(slope, w * distortion_slope(sums.total, n * d, inverse), sums.total)
    return Factors(recon_scale, grad_kl_clamped, grad_kl, of_log_sigma, of_beta)
