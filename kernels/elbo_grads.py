"""Stage three: the gradients, each element a factor of its sample times what the formula says, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_elbo import call
from fused_elbo.call import Gradients

from ._elements import columns, difference, from_units, latents_at, log_sigma_at, row_offsets
from ._factors import BATCH, ELEMENT, factors, sample_sums
from ._layout import Inputs, power_of_2
from ._math import distortion_grad, kl, kl_grad, number
from .elbo_finalize import BLOCK, elbo_shared_sigma_term
from .structs import Batch, GradOutputs, Options, Scalar


@triton.jit
def latent_gradients(lpid, grad_kl_clamped, grad_kl, latents, gradients, batch):
    """Writes those of the lpid-th chunk of the latents; grad_kl_clamped, grad_kl: of its samples."""
    lrows, lchunk = lpid // latents.chunks * latents.ROWS + tl.arange(0, latents.ROWS), lpid % latents.chunks
    grad_kl_clamped, grad_kl = grad_kl_clamped[:, None], grad_kl[:, None]
    llength = from_units(latents.length, latents.VEC, batch.WIDE)
    lg_at = row_offsets(lrows, llength, batch.WIDE)
    for ltile in range(lchunk * latents.per_chunk, (lchunk + 1) * latents.per_chunk):
        lcols = columns(ltile, latents.COLS, batch.WIDE)
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
def elbo_grads_kernel(
    # inputs
    data, latents, stats, opts, grad_outputs,
    # outputs: dense; those not wanted are None
    gradients,
    # shapes, and a tunable
    batch, data_programs, latent_programs, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if data.recon is not None and pid < data_programs:  # see elbo_stats_kernel
        rows, chunk = pid // data.chunks * data.ROWS + tl.arange(0, data.ROWS), pid % data.chunks
        own = factors(rows, sample_sums(stats, rows, batch), opts, grad_outputs, batch)
        a = own.recon_scale[:, None]
        length = from_units(data.length, data.VEC, batch.WIDE)
        g_at = row_offsets(rows, length, batch.WIDE)
        for tile in range(chunk * data.per_chunk, (chunk + 1) * data.per_chunk):
            cols = columns(tile, data.COLS, batch.WIDE)
            inside = (rows < batch.size)[:, None] & (cols < length)
            e = difference(data, rows, cols, inside, batch)
            g = a * e
            if data.log_sigma.base is not None:
                g, g_log_sigma = distortion_grad(a, e, log_sigma_at(data, rows, cols, inside, batch))
                if gradients.log_sigma is not None:
                    to = gradients.log_sigma.dtype.element_ty
                    tl.store(gradients.log_sigma + g_at + cols, g_log_sigma.to(to), inside)
            if gradients.recon is not None:
                tl.store(gradients.recon + g_at + cols, g.to(gradients.recon.dtype.element_ty), inside)
            if gradients.target is not None:
                tl.store(gradients.target + g_at + cols, (-g).to(gradients.target.dtype.element_ty), inside)
    elif latents.mu is not None and pid < data_programs + latent_programs:
        lpid = pid - data_programs
        lrows = lpid // latents.chunks * latents.ROWS + tl.arange(0, latents.ROWS)
        lown = factors(lrows, sample_sums(stats, lrows, batch), opts, grad_outputs, batch)
        latent_gradients(lpid, lown.grad_kl_clamped, lown.grad_kl, latents, gradients, batch)
    else:  # one more program for what is O(B)
        scalar_gradients(stats, opts, grad_outputs, gradients, batch, ROWS)


def is_unequal(grad_output: Tensor | None) -> bool:
    """Whether it has a value for each sample, and its stride does not say that all are one."""
    return grad_output is not None and grad_output.dim() == 1 and grad_output.stride(0) != 0


def elbo_grads(
    inputs: Inputs, batch: Batch, stats: Tensor, options: Options, grad_outputs: call.GradOutputs, gradients: Gradients
) -> None:
    """Fills `gradients`, which are dense in the order of the inputs; those of a log σ that does not vary inside a
    sample, and of β, () or contiguous (B,)."""
    given = GradOutputs(*(Scalar.of(g, None, inputs.dtype) for g in grad_outputs), shared_sigma_term=None)
    if options.MODE.value == BATCH.value and (is_unequal(grad_outputs.loss) or is_unequal(grad_outputs.distortion)):
        term = elbo_shared_sigma_term(inputs, batch, stats, options, given)
        given = given._replace(shared_sigma_term=term)
    of_data = gradients.recon is not None or gradients.target is not None
    of_latents = any(
        g is not None for g in (gradients.mu, gradients.logvar, gradients.prior_mu, gradients.prior_logvar)
    )
    of_scalars = gradients.beta is not None
    if inputs.log_sigma is not None:
        of_data = of_data or gradients.log_sigma is not None
    else:
        of_scalars = of_scalars or gradients.log_sigma is not None
    data, latents = inputs.data_tiles if of_data else None, inputs.latent_tiles if of_latents else None
    data_programs, latent_programs = (0 if tiles is None else tiles.programs(inputs.batch) for tiles in (data, latents))
    programs = data_programs + latent_programs + of_scalars
    if programs == 0:
        return
    with inputs.device_guard():
        elbo_grads_kernel[(programs,)](
            # inputs
            inputs.data(data), inputs.latents(latents), stats, options, given,
            # outputs
            gradients,
            # shapes, and a tunable
            batch, data_programs, latent_programs, ROWS=min(BLOCK, power_of_2(inputs.batch)),
            num_warps=inputs.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
