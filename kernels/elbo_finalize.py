"""Stage two, O(B), one program each: partial sums to loss, distortion, rate and σ; and, for unequal weights of the
samples, what reaches every error through a σ that the batch shares."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_elbo.call import Outputs
from fused_elbo.sigma import Kind

from ._factors import ELEMENT, IMAGE, capacity_gap, shared_sigma, sigma_of, value_of, values_of
from ._layout import Inputs, power_of_2
from ._math import distortion, distortion_of_scaled, distortion_slope, exp, number, sigma_term
from .structs import Batch, GradOutputs, Options, Partials

BLOCK = 4096  # partial sums taken at a time


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
def elbo_finalize_kernel(
    # inputs
    partials, opts,
    # outputs
    outputs,
    # shapes
    batch, data_chunks, latent_chunks,
    # what there is, and tunables
    PER_SAMPLE: tl.constexpr, ROWS: tl.constexpr, DATA_COLS: tl.constexpr, LATENT_COLS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = batch.ACC
    s_total, kl_total, clamped_total = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    for first in range(0, batch.size, ROWS):
        rows = first + tl.arange(0, ROWS)
        s, kl, clamped = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
        if partials.s is not None:
            s = row_sums(partials.s, rows, batch.size, data_chunks, ROWS, DATA_COLS, ACC)
        if partials.kl is not None:
            kl = row_sums(partials.kl, rows, batch.size, latent_chunks, ROWS, LATENT_COLS, ACC)
            clamped = row_sums(partials.clamped, rows, batch.size, latent_chunks, ROWS, LATENT_COLS, ACC)
        tl.store(outputs.stats + rows, s, rows < batch.size)
        tl.store(outputs.stats + (batch.size + 1) + rows, kl, rows < batch.size)
        tl.store(outputs.stats + 2 * (batch.size + 1) + rows, clamped, rows < batch.size)
        s_total += s
        kl_total += kl
        clamped_total += clamped

    total = tl.sum(s_total, 0)
    tl.store(outputs.stats + batch.size, total)
    tl.store(outputs.stats + (batch.size + 1) + batch.size, tl.sum(kl_total, 0))
    tl.store(outputs.stats + 2 * (batch.size + 1) + batch.size, tl.sum(clamped_total, 0))
    distortions, weighted = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    # The sums again, rather than the stats: no thread then reads what another one wrote.
    for first2 in range(0, batch.size, ROWS):
        rows2 = first2 + tl.arange(0, ROWS)
        inside = rows2 < batch.size
        nats, b = tl.zeros((ROWS,), ACC), values_of(opts.beta, rows2, batch)
        if partials.s is not None:
            s2 = row_sums(partials.s, rows2, batch.size, data_chunks, ROWS, DATA_COLS, ACC)
            if opts.MODE == ELEMENT:
                nats = distortion_of_scaled(s2, number(batch.dims, ACC))
            else:
                ls, inverse, _ = sigma_of(rows2, s2, total, opts, batch)
                nats = distortion(s2, number(batch.dims, ACC), ls, inverse)
                if opts.MODE == IMAGE or opts.log_sigma.stride is not None:
                    tl.store(outputs.sigma + rows2, exp(ls), inside)
                else:
                    tl.store(outputs.sigma + rows2, exp(ls), rows2 < 1)
        elif opts.MODE != ELEMENT:
            tl.store(outputs.sigma + rows2, exp(values_of(opts.log_sigma, rows2, batch)), rows2 < 1)
        clamped2, kl2 = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
        if partials.kl is not None:
            kl2 = row_sums(partials.kl, rows2, batch.size, latent_chunks, ROWS, LATENT_COLS, ACC)
            clamped2 = row_sums(partials.clamped, rows2, batch.size, latent_chunks, ROWS, LATENT_COLS, ACC)
        if PER_SAMPLE:
            tl.store(outputs.loss + rows2, nats + b * clamped2, inside)
            tl.store(outputs.distortion + rows2, nats, inside)
            tl.store(outputs.rate + rows2, kl2, inside)
        distortions += tl.where(inside, nats, 0.0)
        weighted += tl.where(inside, b * clamped2, 0.0)

    if not PER_SAMPLE:
        r = number(batch.scale, ACC)
        nats_all = r * tl.sum(distortions, 0)
        penalty = r * tl.sum(weighted, 0)
        if opts.capacity.value is not None:
            gap = capacity_gap(tl.sum(clamped_total, 0), opts, batch)
            penalty = r * number(batch.n, ACC) * value_of(opts.beta, ACC) * tl.abs(gap)
        tl.store(outputs.loss, nats_all + penalty)
        tl.store(outputs.distortion, nats_all)
        tl.store(outputs.rate, r * tl.sum(kl_total, 0))


@triton.jit
def elbo_shared_sigma_term_kernel(
    # inputs
    grad_outputs, stats, opts,
    # output: one number
    shared_sigma_term,
    # shapes, and a tunable
    batch, ROWS: tl.constexpr,
):  # fmt: skip
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


def empty_outputs(inputs: Inputs, options: Options, per_sample: bool) -> Outputs:
    batch = inputs.batch
    reduced = (batch,) if per_sample else ()
    sigma: tuple[int, ...] = ()
    if options.MODE.value == Kind.ELEMENT:
        sigma = (0,)
    elif options.MODE.value == Kind.IMAGE or options.log_sigma.stride is not None:
        sigma = (batch,)
    shapes: list[tuple[int, ...]] = [reduced, reduced, reduced, sigma, (3, batch + 1)]
    return Outputs(*(inputs.like.new_empty(shape, dtype=inputs.dtype) for shape in shapes))


def blocks(batch: int, data_chunks: int, latent_chunks: int, most: int) -> dict[str, int]:
    """How many samples and partial sums of them are taken at a time."""
    data_cols, latent_cols = (min(most, power_of_2(chunks)) for chunks in (data_chunks, latent_chunks))
    rows = max(1, min(most // max(data_cols, latent_cols), power_of_2(batch)))
    return {"ROWS": rows, "DATA_COLS": data_cols, "LATENT_COLS": latent_cols}


def elbo_finalize(inputs: Inputs, batch: Batch, partials: Partials, options: Options, per_sample: bool) -> Outputs:
    outputs = empty_outputs(inputs, options, per_sample)
    data_chunks, latent_chunks = (1 if p is None else p.shape[1] for p in (partials.s, partials.kl))
    with inputs.device_guard():
        elbo_finalize_kernel[(1,)](
            # inputs
            partials, options,
            # outputs
            outputs,
            # shapes
            batch, data_chunks, latent_chunks,
            # what there is, and tunables
            PER_SAMPLE=per_sample, **blocks(inputs.batch, data_chunks, latent_chunks, BLOCK),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return outputs


def elbo_shared_sigma_term(
    inputs: Inputs, batch: Batch, stats: Tensor, options: Options, grad_outputs: GradOutputs
) -> Tensor:
    """() tensor; needed only where σ is shared by the batch and the weights of its samples differ."""
    term = stats.new_empty(())
    with inputs.device_guard():
        elbo_shared_sigma_term_kernel[(1,)](
            # inputs
            grad_outputs, stats, options,
            # output
            term,
            # shapes, and a tunable
            batch, ROWS=min(BLOCK, power_of_2(inputs.batch)),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return term
