"""Stage three: the gradients, each element a factor of its sample times what the formula says, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._elements import (
    columns,
    errors_at,
    from_units,
    latents_at,
    log_sigma_at,
    logvar_range,
    row_offsets,
    rows_and_chunk,
    size,
    tiles_of,
    weights_at,
)
from ._factors import ELEMENT, factors, sample_sums
from ._layout import Inputs, power_of_2
from ._math import clamped_grad, distortion_grad, kl, kl_grad, number, slope, weighted, whole
from ._plan import Launch, at_most
from .elbo_finalize import BLOCK
from .structs import Layout


@triton.jit
def latent_gradients(lpid, grad_kl_clamped, grad_kl, call, gradients):
    """Writes those of the lpid-th chunk of the latents; grad_kl_clamped, grad_kl: of its samples."""
    lrows, lchunk = rows_and_chunk(lpid, call.latents.tiles)
    grad_kl_clamped, grad_kl = grad_kl_clamped[:, None], grad_kl[:, None]
    llength = from_units(call.latents.tiles.length, call.latents.tiles.VEC, call.batch.WIDE)
    lg_at = row_offsets(lrows, llength, call.batch.WIDE)
    lfirst, lend = tiles_of(lchunk, call.latents.tiles)
    for ltile in range(lfirst, lend):
        lcols = columns(ltile, call.latents.tiles.COLS, call.batch.WIDE)
        linside = (lrows < size(call))[:, None] & (lcols < llength)
        d, t, inverse_prior_variance, logvar = latents_at(call, lrows, lcols, linside)
        b = grad_kl_clamped + grad_kl
        if call.latents.FREE_BITS is not None:
            floor = number(call.numbers.free_bits, call.batch.ACC)
            b = tl.where(kl(d, t, inverse_prior_variance) >= floor, grad_kl_clamped, 0.0) + grad_kl
        g_mu, g_logvar, g_prior_mu, g_prior_logvar = kl_grad(b, d, t, inverse_prior_variance)
        if call.latents.RANGE is not None:
            least, most = logvar_range(call)
            g_logvar = clamped_grad(g_logvar, logvar, least, most)
        if gradients.mu is not None:
            tl.store(gradients.mu + lg_at + lcols, g_mu.to(gradients.mu.dtype.element_ty), linside)
        if gradients.logvar is not None:
            tl.store(gradients.logvar + lg_at + lcols, g_logvar.to(gradients.logvar.dtype.element_ty), linside)
        if gradients.prior_mu is not None:
            tl.store(gradients.prior_mu + lg_at + lcols, g_prior_mu.to(gradients.prior_mu.dtype.element_ty), linside)
        if gradients.prior_logvar is not None:
            to = gradients.prior_logvar.dtype.element_ty
            tl.store(gradients.prior_logvar + lg_at + lcols, g_prior_logvar.to(to), linside)


@triton.jit
def scalar_gradients(stats, call, given, gradients, ROWS: tl.constexpr):
    """Writes those of β, of extra_error, and of a log σ that does not vary inside a sample: O(B)."""
    log_sigma_sum, beta_sum = tl.zeros((ROWS,), call.batch.ACC), tl.zeros((ROWS,), call.batch.ACC)
    extra_sum = tl.zeros((ROWS,), call.batch.ACC)
    for sfirst in range(0, size(call), ROWS):
        srows = sfirst + tl.arange(0, ROWS)
        own = factors(srows, sample_sums(stats, srows, call), given, call)
        log_sigma_sum += tl.where(srows < size(call), own.log_sigma, 0.0)
        beta_sum += tl.where(srows < size(call), own.beta, 0.0)
        if (
            gradients.log_sigma is not None
            and call.options.MODE != ELEMENT
            and call.options.log_sigma.stride is not None
        ):
            to = gradients.log_sigma.dtype.element_ty
            tl.store(gradients.log_sigma + srows, own.log_sigma.to(to), srows < size(call))
        if gradients.extra_error is not None:
            of_extra = own.recon_scale * (1.0 / call.options.Q)  # ∂L/∂A
            extra_sum += tl.where(srows < size(call), of_extra, 0.0)
            if call.options.extra_error.stride is not None:
                to = gradients.extra_error.dtype.element_ty
                tl.store(gradients.extra_error + srows, of_extra.to(to), srows < size(call))
        if gradients.beta is not None and call.options.beta.stride is not None:
            tl.store(gradients.beta + srows, own.beta.to(gradients.beta.dtype.element_ty), srows < size(call))
    if gradients.log_sigma is not None and call.options.MODE != ELEMENT and call.options.log_sigma.stride is None:
        tl.store(gradients.log_sigma, tl.sum(log_sigma_sum, 0).to(gradients.log_sigma.dtype.element_ty))
    if gradients.extra_error is not None and call.options.extra_error.stride is None:
        tl.store(gradients.extra_error, tl.sum(extra_sum, 0).to(gradients.extra_error.dtype.element_ty))
    if gradients.beta is not None and call.options.beta.stride is None:
        tl.store(gradients.beta, tl.sum(beta_sum, 0).to(gradients.beta.dtype.element_ty))


@triton.jit
def tile_of_data(tile, rows, call):
    """Returns its columns, and which of its elements there are."""
    cols = columns(tile, call.data.tiles.COLS, call.batch.WIDE)
    length = from_units(call.data.tiles.length, call.data.tiles.VEC, call.batch.WIDE)
    return cols, (rows < size(call))[:, None] & (cols < length)


@triton.jit
def write_by_segments(values, tile, rows, call, to, SEGMENT: tl.constexpr):
    """Writes the sums of a tile's segments, of SEGMENT neighbours each: all of one are inside, or none."""
    SEGMENTS: tl.constexpr = call.data.tiles.COLS // SEGMENT
    segments = tl.reshape(values, (call.data.tiles.ROWS, SEGMENTS, SEGMENT))
    length = from_units(call.data.tiles.length, call.data.tiles.VEC, call.batch.WIDE) // SEGMENT
    cols = columns(tile, SEGMENTS, call.batch.WIDE)
    at = to + row_offsets(rows, length, call.batch.WIDE) + cols
    tl.store(at, tl.sum(segments, 2).to(to.dtype.element_ty), (rows < size(call))[:, None] & (cols < length))


@triton.jit
def data_gradients(pid, call, stats, given, gradients, SEGMENT: tl.constexpr):
    """Writes those of the pid-th chunk of the call.data."""
    rows, chunk = rows_and_chunk(pid, call.data.tiles)
    first, end = tiles_of(chunk, call.data.tiles)
    cols, inside = tile_of_data(first, rows, call)
    if call.data.ACTIVATION is None:
        e, _ = errors_at(call, rows, cols, inside)  # asked for before the factors, which wait for stats
    own = factors(rows, sample_sums(stats, rows, call), given, call)
    a = own.recon_scale[:, None]
    g_at = row_offsets(rows, from_units(call.data.tiles.length, call.data.tiles.VEC, call.batch.WIDE), call.batch.WIDE)
    for tile in range(first, end):
        if call.data.ACTIVATION is not None:
            e, dx_dy = errors_at(call, rows, cols, inside)
        g = a * slope(e, call.options.Q)
        if call.data.log_sigma.stride is not None:
            g, g_log_sigma = distortion_grad(a, e, log_sigma_at(call, rows, cols, inside), call.options.Q)
            if gradients.log_sigma is not None:
                if call.data.weight.stride is not None:
                    g_log_sigma = weighted(weights_at(call, rows, cols, inside), g_log_sigma)
                if SEGMENT > 1:
                    write_by_segments(g_log_sigma, tile, rows, call, gradients.log_sigma, SEGMENT)
                else:
                    to = gradients.log_sigma.dtype.element_ty
                    tl.store(gradients.log_sigma + g_at + cols, g_log_sigma.to(to), inside)
        if call.data.weight.stride is not None:
            g = weighted(weights_at(call, rows, cols, inside), g)
        if gradients.recon is not None:
            g_y = g
            if call.data.ACTIVATION is not None:
                g_y = g * dx_dy
            tl.store(gradients.recon + g_at + cols, g_y.to(gradients.recon.dtype.element_ty), inside)
        if gradients.target is not None:
            tl.store(gradients.target + g_at + cols, (-g).to(gradients.target.dtype.element_ty), inside)
        cols, inside = tile_of_data(tile + 1, rows, call)
        if call.data.ACTIVATION is None:  # none past the chunk
            e, _ = errors_at(call, rows, cols, inside & (cols < end * call.data.tiles.COLS))


@triton.jit
def elbo_grads_kernel(
    # inputs, and shapes
    call, stats, given,
    # outputs: dense; those not wanted are None
    gradients,
    # tunables
    ROWS: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    pid, data_programs = tl.program_id(0), whole(call.data.tiles.programs)
    if call.data.recon is not None and pid < data_programs:  # see elbo_stats_kernel
        # From the end, where the pass before this one has stopped: the cache still holds what that one read last.
        data_gradients(data_programs - 1 - pid, call, stats, given, gradients, SEGMENT)
    elif call.latents.mu is not None and pid < data_programs + whole(call.latents.tiles.programs):
        lrows, _ = rows_and_chunk(pid - data_programs, call.latents.tiles)
        own = factors(lrows, sample_sums(stats, lrows, call), given, call)
        latent_gradients(pid - data_programs, own.grad_kl_clamped, own.grad_kl, call, gradients)
    else:  # one more program for what is O(B)
        scalar_gradients(stats, call, given, gradients, ROWS)


def elbo_grads(inputs: Inputs, layout: Layout, programs: int) -> Launch:
    """A launch of (call, stats, grad_outputs, gradients), which are dense in the order of the inputs; those of a log σ
    that does not vary inside a sample, and of β, () or contiguous (B,); that of one which is broadcast inside a sample,
    as `Inputs.segments` lie."""
    registers = {} if inputs.is_plain or inputs.dtype == torch.float64 else at_most(80)
    return Launch(
        elbo_grads_kernel, programs, layout, min(BLOCK, power_of_2(inputs.batch)), inputs.segment,
        num_warps=inputs.num_warps, **registers, enable_fp_fusion=False,
    )  # fmt: skip
