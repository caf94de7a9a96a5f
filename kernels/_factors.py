"""What S and KL of a sample mean for its elements: its σ, and one factor for each gradient. Where σ is shared within a
sample, a mode of σ is added here."""

import triton
import triton.language as tl

from ._math import exp, number, optimal_sigma

GIVEN, BATCH, IMAGE, ELEMENT = (tl.constexpr(k) for k in range(4))  # as in fused_elbo/sigma.py


@triton.jit
def value_at(pointer, rows, stride, inside, value, PRESENT: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """The tensor's value of each sample (stride 0: one for all), or the number where there is no tensor."""
    if PRESENT:
        values = tl.load(pointer + rows * stride, inside, 0.0).to(ACC)
    else:
        values = tl.zeros((ROWS,), ACC) + number(value, ACC)
    return values


@triton.jit
def sigma_of(
    s, given, total, batch, dims, min_log_sigma,
    MODE: tl.constexpr, SOFTCLIP: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(log σ, 1/σ², slope) of each sample of a block."""
    if MODE == BATCH:
        everywhere = tl.zeros((ROWS,), ACC) + total
        return optimal_sigma(everywhere, batch * dims, min_log_sigma, SOFTCLIP)
    elif MODE == IMAGE:
        return optimal_sigma(s, dims, min_log_sigma, SOFTCLIP)
    else:
        return given, exp(-2.0 * given), s * 0.0


@triton.jit
def factors(
    rows, inside, s, total, clamped, clamped_total,
    grad_loss, grad_distortion, grad_rate, log_sigma, beta, capacity, through,
    grad_loss_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims, batch_size,
    grad_loss_stride, grad_distortion_stride, grad_rate_stride, log_sigma_stride, beta_stride,
    HAS_GRAD_LOSS: tl.constexpr, HAS_GRAD_DISTORTION: tl.constexpr, HAS_GRAD_RATE: tl.constexpr,
    MODE: tl.constexpr, SOFTCLIP: tl.constexpr, HAS_LOG_SIGMA: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_CAPACITY: tl.constexpr, CAPACITY_TENSOR: tl.constexpr, HAS_THROUGH: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What a sample's elements are multiplied by: (a_i; the part of b_i that free_bits can mask; the other part), and
    its part of the gradients of a given log σ and of β."""
    d, n, floor, r = number(dims, ACC), number(batch_size, ACC), number(min_log_sigma, ACC), number(scale, ACC)
    g = r * value_at(grad_loss, rows, grad_loss_stride, inside, grad_loss_value, HAS_GRAD_LOSS, ROWS, ACC)
    of_distortion = value_at(grad_distortion, rows, grad_distortion_stride, inside, 0.0, HAS_GRAD_DISTORTION, ROWS, ACC)
    w = g + r * of_distortion
    through_rate = r * value_at(grad_rate, rows, grad_rate_stride, inside, 0.0, HAS_GRAD_RATE, ROWS, ACC)
    b = value_at(beta, rows, beta_stride, inside, beta_value, HAS_BETA, ROWS, ACC)
    through_loss = g * b
    of_beta = g * clamped
    if HAS_CAPACITY:
        mean = clamped_total / n
        if CAPACITY_TENSOR:
            gap = mean - tl.load(capacity).to(ACC)
        else:
            gap = mean - number(capacity_value, ACC)
        through_loss = through_loss * (tl.where(gap > 0, 1.0, 0.0) - tl.where(gap < 0, 1.0, 0.0))
        of_beta = g * tl.abs(gap)

    error, of_log_sigma = w, w * 0.0
    if MODE != ELEMENT:
        given = value_at(log_sigma, rows, log_sigma_stride, inside, log_sigma_value, HAS_LOG_SIGMA, ROWS, ACC)
        _, inverse, slope = sigma_of(s, given, total, n, d, floor, MODE, SOFTCLIP, ROWS, ACC)
        of_log_sigma = w * (d - s * inverse)
        error = w * inverse
        if MODE == IMAGE:
            error += slope * of_log_sigma / tl.where(s == 0.0, 1.0, s)
        if MODE == BATCH:  # what reaches every error through the σ that the batch shares
            if HAS_THROUGH:
                error += tl.load(through)
            else:
                error += slope * (w * (n * d - total * inverse)) / tl.where(total == 0.0, 1.0, total)
    return error, through_loss, through_rate, of_log_sigma, of_beta


@triton.jit
def sample_factors(
    rows, inside, grad_loss, grad_distortion, grad_rate, stats, log_sigma, beta, capacity, through,
    grad_loss_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims, batch_size,
    batch, grad_loss_stride, grad_distortion_stride, grad_rate_stride, log_sigma_stride, beta_stride,
    HAS_GRAD_LOSS: tl.constexpr, HAS_GRAD_DISTORTION: tl.constexpr, HAS_GRAD_RATE: tl.constexpr,
    MODE: tl.constexpr, SOFTCLIP: tl.constexpr, HAS_LOG_SIGMA: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_CAPACITY: tl.constexpr, CAPACITY_TENSOR: tl.constexpr, HAS_THROUGH: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`factors` of samples whose sums are in stats."""
    return factors(
        rows, inside, tl.load(stats + rows, inside, 0.0), tl.load(stats + batch),
        tl.load(stats + 2 * (batch + 1) + rows, inside, 0.0), tl.load(stats + 2 * (batch + 1) + batch),
        grad_loss, grad_distortion, grad_rate, log_sigma, beta, capacity, through,
        grad_loss_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims, batch_size,
        grad_loss_stride, grad_distortion_stride, grad_rate_stride, log_sigma_stride, beta_stride,
        HAS_GRAD_LOSS, HAS_GRAD_DISTORTION, HAS_GRAD_RATE, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
        HAS_CAPACITY, CAPACITY_TENSOR, HAS_THROUGH, ROWS, ACC,
    )  # fmt: skip
