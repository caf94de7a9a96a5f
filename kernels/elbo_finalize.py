"""Stage two, O(B): partial sums to loss, distortion, rate and σ, by the last program of stage one; and, for unequal
weights of the samples, what reaches every error through a σ that the batch shares, by a program of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fused_elbo.call import Outputs
from fused_elbo.sigma import Kind

from ._elements import size
from ._factors import (
    BATCH_CAPACITY,
    BATCH_FREE_NATS,
    ELEMENT,
    IMAGE,
    SAMPLE_CAPACITY,
    SAMPLE_FREE_NATS,
    betas,
    dims_of,
    elements_of,
    limited_batch,
    limited_rates,
    one_beta,
    one_sigma,
    reduction_weight,
    sample_sums,
    shared_sigma,
    sigma_of,
    values_of,
)
from ._layout import Inputs, Tiles, power_of_2
from ._math import distortion, distortion_of_scaled, distortion_slope, exp, sigma_term, whole
from ._plan import Launch, empty
from .structs import Blocks, Layout, Options, Sums, constant

BLOCK = 512  # partial sums taken at a time: more of them need registers that the pass over the data wants
FEW = 8192  # of more partial sums, four times as many are taken at a time


@triton.jit
def row_sums(partials, rows, call, tiles, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Σ over the chunks of each row, in an order that only their number decides."""
    chunks = whole(tiles.chunks)
    total = tl.zeros((ROWS, COLS), call.batch.ACC)
    for first in range(0, chunks, COLS):
        cols = first + tl.arange(0, COLS)
        inside = (rows < size(call))[:, None] & (cols < chunks)[None, :]
        total += tl.load(partials + rows[:, None] * chunks + cols[None, :], inside, 0.0)
    return tl.sum(total, 1)


@triton.jit
def sums_of(rows, call, partials, blocks):
    """Returns A, KL, clamped KL and the sum of the weights of a block of samples."""
    a, kl, clamped, weights = zeros(call, blocks), zeros(call, blocks), zeros(call, blocks), zeros(call, blocks)
    if partials.a is not None:
        a = row_sums(partials.a, rows, call, call.data.tiles, blocks.ROWS, blocks.DATA)
    if partials.weights is not None:
        weights = row_sums(partials.weights, rows, call, call.data.tiles, blocks.ROWS, blocks.DATA)
    if partials.kl is not None:
        kl = row_sums(partials.kl, rows, call, call.latents.tiles, blocks.ROWS, blocks.LATENT)
        clamped = kl
        if partials.clamped is not None:
            clamped = row_sums(partials.clamped, rows, call, call.latents.tiles, blocks.ROWS, blocks.LATENT)
    return a, kl, clamped, weights


@triton.jit
def zeros(call, blocks):
    return tl.zeros((blocks.ROWS,), call.batch.ACC)


@triton.jit
def finalize(call, partials, outputs, blocks):
    """Writes all outputs."""
    a_sum, kl_sum, clamped_sum, weights_sum = (
        zeros(call, blocks), zeros(call, blocks), zeros(call, blocks), zeros(call, blocks)
    )  # fmt: skip
    for first in range(0, size(call), blocks.ROWS):
        rows = first + tl.arange(0, blocks.ROWS)
        a, kl, clamped, weights = sums_of(rows, call, partials, blocks)
        tl.store(outputs.stats + rows, a, rows < size(call))
        tl.store(outputs.stats + (size(call) + 1) + rows, kl, rows < size(call))
        tl.store(outputs.stats + 2 * (size(call) + 1) + rows, clamped, rows < size(call))
        if partials.weights is not None:
            tl.store(outputs.stats + 3 * (size(call) + 1) + rows, weights, rows < size(call))
            weights_sum += weights
        a_sum += a
        kl_sum += kl
        clamped_sum += clamped
    total, kl_total, clamped_total = tl.sum(a_sum, 0), tl.sum(kl_sum, 0), tl.sum(clamped_sum, 0)
    elements = elements_of(call)
    tl.store(outputs.stats + size(call), total)
    tl.store(outputs.stats + (size(call) + 1) + size(call), kl_total)
    tl.store(outputs.stats + 2 * (size(call) + 1) + size(call), clamped_total)
    if partials.weights is not None:
        elements = tl.sum(weights_sum, 0)
        tl.store(outputs.stats + 3 * (size(call) + 1) + size(call), elements)

    if (
        blocks.PER_SAMPLE
        or call.options.MODE == IMAGE
        or call.options.log_sigma.stride is not None
        or call.options.beta.stride is not None
        or call.options.LIMIT == SAMPLE_CAPACITY
        or call.options.LIMIT == SAMPLE_FREE_NATS
    ):
        d_sum, penalty_sum = zeros(call, blocks), zeros(call, blocks)
        # The sums again, rather than the stats: no thread then reads what another one wrote.
        for first2 in range(0, size(call), blocks.ROWS):
            rows2 = first2 + tl.arange(0, blocks.ROWS)
            a2, kl2, clamped2, weights2 = sums_of(rows2, call, partials, blocks)
            dims2 = dims_of(call)
            if partials.weights is not None:
                dims2 = weights2
            sums2 = Sums(a2, total, clamped2, clamped_total, dims2, elements)
            d2, penalty2 = sample_terms(rows2, sums2, call, partials, outputs)
            if blocks.PER_SAMPLE:
                tl.store(outputs.loss + rows2, d2 + penalty2, rows2 < size(call))
                tl.store(outputs.distortion + rows2, d2, rows2 < size(call))
                tl.store(outputs.rate + rows2, kl2, rows2 < size(call))
            d_sum += tl.where(rows2 < size(call), d2, 0.0)
            penalty_sum += tl.where(rows2 < size(call), penalty2, 0.0)
        distortion_total, penalty = tl.sum(d_sum, 0), tl.sum(penalty_sum, 0)
    else:  # both are linear in what is summed already
        distortion_total, penalty = batch_terms(total, clamped_total, elements, call, partials, outputs)

    if not blocks.PER_SAMPLE:
        r = reduction_weight(elements, call)
        if call.options.LIMIT == BATCH_CAPACITY or call.options.LIMIT == BATCH_FREE_NATS:
            penalty = limited_batch(clamped_total, call)
        tl.store(outputs.loss, r * distortion_total + r * penalty)
        tl.store(outputs.distortion, r * distortion_total)
        tl.store(outputs.rate, r * kl_total)


@triton.jit
def sample_terms(rows, sums, call, partials, outputs):
    """Returns the distortion of each sample of a block, and β times its KL. Writes its σ."""
    nats = sums.a * 0.0
    if call.options.MODE == ELEMENT:
        if partials.a is not None:
            nats = distortion_of_scaled(sums.a, sums.dims, call.options)
    else:
        ls, inverse, _ = sigma_of(rows, sums, call)
        if partials.a is not None:
            nats = distortion(sums.a, sums.dims, ls, inverse, call.options)
        if call.options.MODE == IMAGE or call.options.log_sigma.stride is not None:
            tl.store(outputs.sigma + rows, exp(ls), rows < size(call))
        else:
            tl.store(outputs.sigma + rows, exp(ls), rows < 1)
    return nats, betas(rows, call) * limited_rates(sums.clamped, call)


@triton.jit
def batch_terms(total, clamped_total, elements, call, partials, outputs):
    """Returns their sums over the batch, where all samples have one σ and one β, or σ varies inside a sample. Writes
    the σ."""
    nats = total * 0.0
    if call.options.MODE == ELEMENT:
        if partials.a is not None:
            nats = distortion_of_scaled(total, elements, call.options)
    else:
        ls, inverse = one_sigma(total, elements, call)
        if partials.a is not None:
            nats = distortion(total, elements, ls, inverse, call.options)
        tl.store(outputs.sigma, exp(ls))
    return nats, one_beta(call) * clamped_total


@triton.jit
def elbo_shared_sigma_term_kernel(
    # inputs, and shapes
    call, stats, given,
    # output: one number
    shared_sigma_term,
    # a tunable
    ROWS: tl.constexpr,
):  # fmt: skip
    """slope · Σ_j w_j (D − A_j/σ^q) / ΣA for a σ shared by the batch and unequal w_j."""
    total, elements = tl.load(stats + size(call)), elements_of(call)
    if call.data.weight.stride is not None:
        elements = tl.load(stats + 3 * (size(call) + 1) + size(call))
    _, inverse, slope = shared_sigma(total, elements, call)
    r = reduction_weight(elements, call)
    flows = tl.zeros((ROWS,), call.batch.ACC)
    for first in range(0, size(call), ROWS):
        rows = first + tl.arange(0, ROWS)
        sums = sample_sums(stats, rows, call)
        w = values_of(given.loss, call.numbers.grad_scale, call.grad_outputs.loss, rows, call)
        w += values_of(given.distortion, call.numbers.grad_scale, call.grad_outputs.distortion, rows, call)
        flows += r * w * distortion_slope(sums.a, sums.dims, inverse)
    tl.store(shared_sigma_term, sigma_term(slope, tl.sum(flows, 0), total))


class EmptyOutputs:
    """The outputs of a call."""

    def __init__(self, inputs: Inputs, options: Options, per_sample: bool, device: torch.device) -> None:
        batch = inputs.batch
        reduced = (batch,) if per_sample else ()
        sigma: tuple[int, ...] = ()
        if options.MODE.value == Kind.ELEMENT:
            sigma = (0,)
        elif options.MODE.value == Kind.IMAGE or options.log_sigma.stride is not None:
            sigma = (batch,)
        rows = 3 if inputs.weight is None else 4
        shapes: tuple[tuple[int, ...], ...] = (reduced, reduced, reduced, sigma, (rows, batch + 1))
        self._makers = [empty(shape, inputs.dtype, device) for shape in shapes]

    def __call__(self) -> Outputs:
        return Outputs._make([make() for make in self._makers])


def blocks(batch: int, data: Tiles | None, latents: Tiles | None, per_sample: bool, least: int = 1) -> Blocks:
    """`least`: partial sums of a sample that are taken at a time, although it has fewer: so one kernel serves more."""
    chunks = [least if tiles is None else max(least, tiles.chunks) for tiles in (data, latents)]
    most = BLOCK if batch * max(chunks) <= FEW else 4 * BLOCK
    cols = [min(most, power_of_2(n)) for n in chunks]
    rows = max(1, min(most // max(cols), power_of_2(batch)))
    return Blocks(*map(constant, (per_sample, rows, *cols)))


def elbo_shared_sigma_term(inputs: Inputs, layout: Layout) -> Launch:
    """A launch of (call, stats, grad_outputs, shared_sigma_term), which is needed only where σ is shared by the batch
    and the weights of its samples differ."""
    return Launch(
        elbo_shared_sigma_term_kernel, 1, layout, min(BLOCK, power_of_2(inputs.batch)),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
