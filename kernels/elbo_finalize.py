"""Stage two, O(B): partial sums to loss, distortion, rate and σ, by the last program of stage one; and, for unequal
weights of the samples, what reaches every error through a σ that the batch shares, by a program of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fused_elbo.call import Outputs
from fused_elbo.sigma import Kind

from ._factors import ELEMENT, IMAGE, capacity_gap, one_sigma, shared_sigma, sigma_of, value_of, values_of
from ._layout import Inputs, Tiles, power_of_2
from ._math import distortion, distortion_of_scaled, distortion_slope, exp, number, sigma_term
from ._plan import Launch, empty
from ._unpack import batch_of, grad_outputs_of, options_of
from .structs import Blocks, Layout, Options, constant

BLOCK = 2048  # partial sums taken at a time: of more, a thread's would need registers that the passes want


@triton.jit
def row_sums(partials, rows, batch, chunks, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """Σ over the chunks of each row, in an order that only their number decides."""
    total = tl.zeros((ROWS, COLS), ACC)
    for first in range(0, chunks, COLS):
        cols = first + tl.arange(0, COLS)
        inside = (rows < batch)[:, None] & (cols < chunks)[None, :]
        total += tl.load(partials + rows[:, None] * chunks + cols[None, :], inside, 0.0)
    return tl.sum(total, 1)


@triton.jit
def sums_of(rows, partials, data, latents, batch, blocks):
    """Returns S, KL and clamped KL of a block of samples."""
    s, kl, clamped = zeros(blocks, batch), zeros(blocks, batch), zeros(blocks, batch)
    if partials.s is not None:
        s = row_sums(partials.s, rows, batch.size, data.chunks, blocks.ROWS, blocks.DATA, batch.ACC)
    if partials.kl is not None:
        kl = row_sums(partials.kl, rows, batch.size, latents.chunks, blocks.ROWS, blocks.LATENT, batch.ACC)
        clamped = kl
        if partials.clamped is not None:
            clamped = row_sums(
                partials.clamped, rows, batch.size, latents.chunks, blocks.ROWS, blocks.LATENT, batch.ACC
            )
    return s, kl, clamped


@triton.jit
def zeros(blocks, batch):
    return tl.zeros((blocks.ROWS,), batch.ACC)


@triton.jit
def finalize(partials, data, latents, opts, outputs, batch, blocks):
    """Writes all outputs. `data`, `latents`: the tiles that the partial sums are of."""
    s_sum, kl_sum, clamped_sum = zeros(blocks, batch), zeros(blocks, batch), zeros(blocks, batch)
    for first in range(0, batch.size, blocks.ROWS):
        rows = first + tl.arange(0, blocks.ROWS)
        s, kl, clamped = sums_of(rows, partials, data, latents, batch, blocks)
        tl.store(outputs.stats + rows, s, rows < batch.size)
        tl.store(outputs.stats + (batch.size + 1) + rows, kl, rows < batch.size)
        tl.store(outputs.stats + 2 * (batch.size + 1) + rows, clamped, rows < batch.size)
        s_sum += s
        kl_sum += kl
        clamped_sum += clamped
    total, kl_total, clamped_total = tl.sum(s_sum, 0), tl.sum(kl_sum, 0), tl.sum(clamped_sum, 0)
    tl.store(outputs.stats + batch.size, total)
    tl.store(outputs.stats + (batch.size + 1) + batch.size, kl_total)
    tl.store(outputs.stats + 2 * (batch.size + 1) + batch.size, clamped_total)

    if blocks.PER_SAMPLE or opts.MODE == IMAGE or opts.log_sigma.stride is not None or opts.beta.stride is not None:
        d_sum, penalty_sum = zeros(blocks, batch), zeros(blocks, batch)
        # The sums again, rather than the stats: no thread then reads what another one wrote.
        for first2 in range(0, batch.size, blocks.ROWS):
            rows2 = first2 + tl.arange(0, blocks.ROWS)
            s2, kl2, clamped2 = sums_of(rows2, partials, data, latents, batch, blocks)
            d2, penalty2 = sample_terms(rows2, s2, clamped2, total, partials, opts, outputs, batch)
            if blocks.PER_SAMPLE:
                tl.store(outputs.loss + rows2, d2 + penalty2, rows2 < batch.size)
                tl.store(outputs.distortion + rows2, d2, rows2 < batch.size)
                tl.store(outputs.rate + rows2, kl2, rows2 < batch.size)
            d_sum += tl.where(rows2 < batch.size, d2, 0.0)
            penalty_sum += tl.where(rows2 < batch.size, penalty2, 0.0)
        distortion_total, penalty = tl.sum(d_sum, 0), tl.sum(penalty_sum, 0)
    else:  # both are linear in what is summed already
        distortion_total, penalty = batch_terms(total, clamped_total, partials, opts, outputs, batch)

    if not blocks.PER_SAMPLE:
        r = number(batch.scale, batch.ACC)
        if opts.capacity.value is not None:
            gap = capacity_gap(clamped_total, opts, batch)
            penalty = number(batch.n, batch.ACC) * value_of(opts.beta, batch.ACC) * tl.abs(gap)
        tl.store(outputs.loss, r * distortion_total + r * penalty)
        tl.store(outputs.distortion, r * distortion_total)
        tl.store(outputs.rate, r * kl_total)


@triton.jit
def sample_terms(rows, s, clamped, total, partials, opts, outputs, batch):
    """Returns the distortion of each sample of a block, and β times its KL. Writes its σ."""
    nats = s * 0.0
    if opts.MODE == ELEMENT:
        if partials.s is not None:
            nats = distortion_of_scaled(s, number(batch.dims, batch.ACC))
    else:
        ls, inverse, _ = sigma_of(rows, s, total, opts, batch)
        if partials.s is not None:
            nats = distortion(s, number(batch.dims, batch.ACC), ls, inverse)
        if opts.MODE == IMAGE or opts.log_sigma.stride is not None:
            tl.store(outputs.sigma + rows, exp(ls), rows < batch.size)
        else:
            tl.store(outputs.sigma + rows, exp(ls), rows < 1)
    return nats, values_of(opts.beta, rows, batch) * clamped


@triton.jit
def batch_terms(total, clamped_total, partials, opts, outputs, batch):
    """Returns their sums over the batch, where all samples have one σ and one β, or σ varies inside a sample. Writes
    the σ."""
    n, nats = number(batch.n, batch.ACC) * number(batch.dims, batch.ACC), total * 0.0
    if opts.MODE == ELEMENT:
        if partials.s is not None:
            nats = distortion_of_scaled(total, n)
    else:
        ls, inverse = one_sigma(total, opts, batch)
        if partials.s is not None:
            nats = distortion(total, n, ls, inverse)
        tl.store(outputs.sigma, exp(ls))
    return nats, value_of(opts.beta, batch.ACC) * clamped_total


@triton.jit
def write_shared_sigma_term(grad_outputs, stats, opts, shared_sigma_term, batch, ROWS: tl.constexpr):
    """slope · Σ_j w_j (D − S_j/σ²) / ΣS for a σ shared by the batch and unequal w_j."""
    d, r = number(batch.dims, batch.ACC), number(batch.scale, batch.ACC)
    total = tl.load(stats + batch.size)
    _, inverse, slope = shared_sigma(total, opts, batch)
    flows = tl.zeros((ROWS,), batch.ACC)
    for first in range(0, batch.size, ROWS):
        rows = first + tl.arange(0, ROWS)
        w = values_of(grad_outputs.loss, rows, batch)
        w += values_of(grad_outputs.distortion, rows, batch)
        flows += r * w * distortion_slope(tl.load(stats + rows, rows < batch.size, 0.0), d, inverse)
    tl.store(shared_sigma_term, sigma_term(slope, tl.sum(flows, 0), total))


@triton.jit
def elbo_shared_sigma_term_kernel(
    # inputs
    tensors, numbers, stats, given,
    # output: one number
    shared_sigma_term,
    # shapes, and a tunable
    layout, ROWS: tl.constexpr,
):  # fmt: skip
    write_shared_sigma_term(
        grad_outputs_of(given, None, numbers, layout), stats, options_of(tensors, numbers, layout), shared_sigma_term,
        batch_of(layout), ROWS,
    )  # fmt: skip


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
        shapes: tuple[tuple[int, ...], ...] = (reduced, reduced, reduced, sigma, (3, batch + 1))
        self._makers = [empty(shape, inputs.dtype, device) for shape in shapes]

    def __call__(self) -> Outputs:
        return Outputs._make([make() for make in self._makers])


def blocks(batch: int, data: Tiles | None, latents: Tiles | None, per_sample: bool) -> Blocks:
    cols = [1 if tiles is None else min(BLOCK, power_of_2(tiles.chunks)) for tiles in (data, latents)]
    rows = max(1, min(BLOCK // max(cols), power_of_2(batch)))
    return Blocks(*map(constant, (per_sample, rows, *cols)))


def elbo_shared_sigma_term(inputs: Inputs, layout: Layout) -> Launch:
    """A launch of (tensors, numbers, stats, grad_outputs, shared_sigma_term), which is needed only where σ is shared by
    the batch and the weights of its samples differ."""
    return Launch(
        elbo_shared_sigma_term_kernel, 1, layout, min(BLOCK, power_of_2(inputs.batch)),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
