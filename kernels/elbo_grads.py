"""Stage three: the gradients, each element a factor of its sample times what the formula says, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from ._elements import columns, difference, from_units, latents_at, log_sigma_at, row_offsets, rows_and_chunk
from ._factors import ELEMENT, factors, sample_sums
from ._layout import Inputs, power_of_2
from ._math import distortion_grad, kl, kl_grad, number
from ._plan import Launch
from ._unpack import batch_of, data_of, grad_outputs_of, latents_of, options_of
from .elbo_finalize import BLOCK
from .structs import Layout


@triton.jit
def latent_gradients(lpid, grad_kl_clamped, grad_kl, latents, gradients, batch):
    """Writes those of the lpid-th chunk of the latents; grad_kl_clamped, grad_kl: of its samples."""
    lrows, lchunk = rows_and_chunk(lpid, latents.tiles)
    grad_kl_clamped, grad_kl = grad_kl_clamped[:, None], grad_kl[:, None]
    llength = from_units(latents.tiles.length, latents.tiles.VEC, batch.WIDE)
    lg_at = row_offsets(lrows, llength, batch.WIDE)
    for ltile in range(lchunk * latents.tiles.per_chunk, (lchunk + 1) * latents.tiles.per_chunk):
        lcols = columns(ltile, latents.tiles.COLS, batch.WIDE)
        linside = (lrows < batch.size)[:, None] & (lcols < llength)
        d, t, inverse_prior_variance = latents_at(latents, lrows, lcols, linside, batch)
        b = grad_kl_clamped + grad_kl
        if latents.free_bits is not None:
            floor = number(latents.free_bits, batch.ACC)
            b = tl.where(kl(d, t, inverse_prior_variance) >= floor, grad_kl_clamped, 0.0) + grad_kl
        g_mu, g_logvar, g_prior_mu, g_prior_logvar = kl_grad(b, d, t, inverse_prior_variance)
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
def scalar_gradients(stats, opts, grad_outputs, gradients, batch, ROWS: tl.constexpr):
    """Writes those of β, and of a log σ that does not vary inside a sample: O(B)."""
    log_sigma_sum, beta_sum = tl.zeros((ROWS,), batch.ACC), tl.zeros((ROWS,), batch.ACC)
    for sfirst in range(0, batch.size, ROWS):
        srows = sfirst + tl.arange(0, ROWS)
        own = factors(srows, sample_sums(stats, srows, batch), opts, grad_outputs, batch)
        log_sigma_sum += tl.where(srows < batch.size, own.log_sigma, 0.0)
        beta_sum += tl.where(srows < batch.size, own.beta, 0.0)
        if gradients.log_sigma is not None and opts.MODE != ELEMENT and opts.log_sigma.stride is not None:
            to = gradients.log_sigma.dtype.element_ty
            tl.store(gradients.log_sigma + srows, own.log_sigma.to(to), srows < batch.size)
        if gradients.beta is not None and opts.beta.stride is not None:
            tl.store(gradients.beta + srows, own.beta.to(gradients.beta.dtype.element_ty), srows < batch.size)
    if gradients.log_sigma is not None and opts.MODE != ELEMENT and opts.log_sigma.stride is None:
        tl.store(gradients.log_sigma, tl.sum(log_sigma_sum, 0).to(gradients.log_sigma.dtype.element_ty))
    if gradients.beta is not None and opts.beta.stride is None:
        tl.store(gradients.beta, tl.sum(beta_sum, 0).to(gradients.beta.dtype.element_ty))


@triton.jit
def data_gradients(pid, stats, data, opts, grad_outputs, gradients, batch):
    """Writes those of the pid-th chunk of the data."""
    rows, chunk = rows_and_chunk(pid, data.tiles)
    own = factors(rows, sample_sums(stats, rows, batch), opts, grad_outputs, batch)
    a = own.recon_scale[:, None]
    length = from_units(data.tiles.length, data.tiles.VEC, batch.WIDE)
    g_at = row_offsets(rows, length, batch.WIDE)
    for tile in range(chunk * data.tiles.per_chunk, (chunk + 1) * data.tiles.per_chunk):
        cols = columns(tile, data.tiles.COLS, batch.WIDE)
        inside = (rows < batch.size)[:, None] & (cols < length)
        e = difference(data, rows, cols, inside, batch)
        g = a * e
        if data.log_sigma.stride is not None:
            g, g_log_sigma = distortion_grad(a, e, log_sigma_at(data, rows, cols, inside, batch))
            if gradients.log_sigma is not None:
                to = gradients.log_sigma.dtype.element_ty
                tl.store(gradients.log_sigma + g_at + cols, g_log_sigma.to(to), inside)
        if gradients.recon is not None:
            tl.store(gradients.recon + g_at + cols, g.to(gradients.recon.dtype.element_ty), inside)
        if gradients.target is not None:
            tl.store(gradients.target + g_at + cols, (-g).to(gradients.target.dtype.element_ty), inside)


@triton.jit
def all_gradients(stats, data, latents, opts, grad_outputs, gradients, batch, ROWS: tl.constexpr):
    pid = tl.program_id(0)
    if data.recon.stride is not None and pid < data.tiles.programs:  # see elbo_stats.all_sums
        # From the end, where the pass before this one has stopped: the cache still holds what that one read last.
        data_gradients(data.tiles.programs - 1 - pid, stats, data, opts, grad_outputs, gradients, batch)
    elif latents.mu.stride is not None and pid < data.tiles.programs + latents.tiles.programs:
        lrows, _ = rows_and_chunk(pid - data.tiles.programs, latents.tiles)
        own = factors(lrows, sample_sums(stats, lrows, batch), opts, grad_outputs, batch)
        latent_gradients(pid - data.tiles.programs, own.grad_kl_clamped, own.grad_kl, latents, gradients, batch)
    else:  # one more program for what is O(B)
        scalar_gradients(stats, opts, grad_outputs, gradients, batch, ROWS)


@triton.jit
def elbo_grads_kernel(
    # inputs
    tensors, numbers, stats, given, shared_sigma_term,
    # outputs: dense; those not wanted are None
    gradients,
    # shapes, and a tunable
    layout, ROWS: tl.constexpr,
):  # fmt: skip
    all_gradients(
        stats, data_of(tensors, layout), latents_of(tensors, numbers, layout), options_of(tensors, numbers, layout),
        grad_outputs_of(given, shared_sigma_term, numbers, layout), gradients, batch_of(layout), ROWS,
    )  # fmt: skip


def elbo_grads(inputs: Inputs, layout: Layout, programs: int) -> Launch:
    """A launch of (tensors, numbers, stats, grad_outputs, shared_sigma_term, gradients), which are dense in the order
    of the inputs; those of a log σ that does not vary inside a sample, and of β, () or contiguous (B,)."""
    return Launch(
        elbo_grads_kernel, programs, layout, min(BLOCK, power_of_2(inputs.batch)),
        num_warps=inputs.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
