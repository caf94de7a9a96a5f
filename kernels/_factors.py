"""What A and KL of a sample mean for its elements: its σ, and one factor for each gradient. Where σ is shared within a
sample, a mode of σ is added here."""

import triton
import triton.language as tl

from ._elements import size
from ._math import distortion_slope, exp, limited, limited_slope, number, optimal_sigma, sigma_term, whole
from .structs import Factors, Sums

GIVEN, BATCH, IMAGE, ELEMENT = (tl.constexpr(k) for k in range(4))  # as in fused_elbo/sigma.py
BATCH_CAPACITY, SAMPLE_CAPACITY, BATCH_FREE_NATS, SAMPLE_FREE_NATS = (tl.constexpr(k) for k in range(1, 5))  # rate.py


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
def dims_of(call):
    """Returns how many elements a sample has, where they have no weights."""
    return number(call.batch.dims, call.batch.ACC)


@triton.jit
def elements_of(call):
    """The same of the batch."""
    return number(call.batch.n, call.batch.ACC) * number(call.batch.dims, call.batch.ACC)


@triton.jit
def reduction_weight(elements, call):
    """Returns what the reduction multiplies a sample by. `elements`: the sum of the weights, where there are any."""
    if call.data.weight.stride is not None and call.options.MEAN is not None:
        return 1.0 / tl.where(elements == 0.0, elements_of(call), elements)
    else:
        return number(call.batch.scale, call.batch.ACC)


@triton.jit
def shared_sigma(total, elements, call):
    """Returns (log σ, 1/σ^q, slope) for the σ that the batch shares."""
    return optimal_sigma(total, elements, number(call.numbers.min_log_sigma, call.batch.ACC), call.options)


@triton.jit
def sigma_of(rows, sums, call):
    """Returns (log σ, 1/σ^q, slope) of each sample of a block. `sums`: its `structs.Sums`."""
    if call.options.MODE == BATCH:
        return shared_sigma((rows * 0).to(call.batch.ACC) + sums.total, sums.elements, call)
    elif call.options.MODE == IMAGE:
        least = number(call.numbers.min_log_sigma, call.batch.ACC)
        return optimal_sigma(sums.a, sums.dims, least, call.options)
    else:
        given = values_of(call.tensors.log_sigma, call.numbers.log_sigma, call.options.log_sigma, rows, call)
        return given, exp(given * (-1.0 * call.options.Q)), sums.a * 0.0


@triton.jit
def one_sigma(total, elements, call):
    """Returns (log σ, 1/σ^q) where they are the same for all samples."""
    if call.options.MODE == BATCH:
        ls, inverse, _ = shared_sigma(total, elements, call)
    else:
        ls = value_of(call.tensors.log_sigma, call.numbers.log_sigma, call.batch.ACC)
        inverse = exp(ls * (-1.0 * call.options.Q))
    return ls, inverse


@triton.jit
def limit_of(call):
    return value_of(call.tensors.limit, call.numbers.limit, call.batch.ACC)


@triton.jit
def limited_rates(clamped, call):
    """Returns what β multiplies in the loss of each sample."""
    if call.options.LIMIT == SAMPLE_CAPACITY or call.options.LIMIT == SAMPLE_FREE_NATS:
        return limited(clamped, limit_of(call), call.options)
    else:
        return clamped


@triton.jit
def limited_batch(clamped_total, call):
    """Returns what a limit per batch makes of the samples' rates: their sum, times β."""
    n = number(call.batch.n, call.batch.ACC)
    return n * one_beta(call) * limited(clamped_total / n, limit_of(call), call.options)


@triton.jit
def sample_sums(stats, rows, call):
    """Reads the `structs.Sums` of a block of samples from stats."""
    row = size(call) + 1
    dims, elements = dims_of(call), elements_of(call)
    if call.data.weight.stride is not None:
        dims = tl.load(stats + 3 * row + rows, rows < size(call), 0.0)
        elements = tl.load(stats + 3 * row + size(call))
    return Sums(
        tl.load(stats + rows, rows < size(call), 0.0), tl.load(stats + size(call)),
        tl.load(stats + 2 * row + rows, rows < size(call), 0.0), tl.load(stats + 2 * row + size(call)),
        dims, elements,
    )  # fmt: skip


@triton.jit
def factors(rows, sums, given, call):
    """Returns the `structs.Factors` of a block of samples. `given`: the `structs.GradOutputs`."""
    r = reduction_weight(sums.elements, call)
    g = r * values_of(given.loss, call.numbers.grad_scale, call.grad_outputs.loss, rows, call)
    w = g + r * values_of(given.distortion, call.numbers.grad_scale, call.grad_outputs.distortion, rows, call)
    grad_kl = r * values_of(given.rate, call.numbers.grad_scale, call.grad_outputs.rate, rows, call)
    grad_kl_clamped = g * betas(rows, call)
    of_beta = g * sums.clamped
    if call.options.LIMIT is not None:
        rate = sums.clamped
        if call.options.LIMIT == BATCH_CAPACITY or call.options.LIMIT == BATCH_FREE_NATS:
            rate = rate * 0.0 + sums.clamped_total / number(call.batch.n, call.batch.ACC)
        grad_kl_clamped = grad_kl_clamped * limited_slope(rate, limit_of(call), call.options)
        of_beta = g * limited(rate, limit_of(call), call.options)

    recon_scale, of_log_sigma = w, w * 0.0
    if call.options.MODE != ELEMENT:
        _, inverse, slope = sigma_of(rows, sums, call)
        of_log_sigma = w * distortion_slope(sums.a, sums.dims, inverse)
        recon_scale = w * inverse
        if call.options.MODE == IMAGE:
            recon_scale += sigma_term(slope, of_log_sigma, sums.a)
        if call.options.MODE == BATCH:
            if given.shared_sigma_term is not None:
                recon_scale += tl.load(given.shared_sigma_term)
            else:  # equal weights
                through_sigma = w * distortion_slope(sums.total, sums.elements, inverse)
                recon_scale += sigma_term(slope, through_sigma, sums.total)
    return Factors(recon_scale, grad_kl_clamped, grad_kl, of_log_sigma, of_beta)
