"""Stage three: the gradients, each element a factor of its sample times what the formula says, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._factors import BATCH, ELEMENT, sample_factors
from ._layout import Output, Tiles
from ._math import exp, expm1, kl, number
from .elbo_finalize import BLOCK, Knobs, each, elbo_weights, stride_of, unequal
from .elbo_stats import columns, elements, log_sigma_at, row_offsets


@triton.jit
def latent_gradients(
    lpid, through_loss, through_rate, mu, logvar, prior_mu, prior_logvar, free_bits,
    g_mu, g_logvar, g_prior_mu, g_prior_logvar,
    batch, latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
    PRIOR: tl.constexpr, FREE_BITS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    LATENT_VEC: tl.constexpr, LATENT_ROWS: tl.constexpr, LATENT_COLS: tl.constexpr,
):  # fmt: skip
    """Of the lpid-th chunk of the latents; through_loss, through_rate: of its samples."""
    lrows, lchunk = lpid // latent_chunks * LATENT_ROWS + tl.arange(0, LATENT_ROWS), lpid % latent_chunks
    through_loss, through_rate = through_loss[:, None], through_rate[:, None]
    llength = elements(latents, LATENT_VEC, WIDE)
    m_at = row_offsets(lrows, elements(mu_stride, LATENT_VEC, WIDE), WIDE)
    l_at = row_offsets(lrows, elements(logvar_stride, LATENT_VEC, WIDE), WIDE)
    lg_at = row_offsets(lrows, llength, WIDE)
    for ltile in range(lchunk * latent_tiles, (lchunk + 1) * latent_tiles):
        lcols = columns(ltile, LATENT_COLS, WIDE)
        linside = (lrows < batch)[:, None] & (lcols < llength)
        d = tl.load(mu + m_at + lcols, linside, 0.0).to(ACC)
        t = tl.load(logvar + l_at + lcols, linside, 0.0).to(ACC)
        inverse_prior = tl.full((LATENT_ROWS, LATENT_COLS), 1.0, ACC)
        if PRIOR:
            pm_at = row_offsets(lrows, elements(prior_mu_stride, LATENT_VEC, WIDE), WIDE)
            pl_at = row_offsets(lrows, elements(prior_logvar_stride, LATENT_VEC, WIDE), WIDE)
            p = tl.load(prior_logvar + pl_at + lcols, linside, 0.0).to(ACC)
            d = d - tl.load(prior_mu + pm_at + lcols, linside, 0.0).to(ACC)
            t = t - p
            inverse_prior = exp(-p)
        b = through_loss + through_rate
        if FREE_BITS:
            b = tl.where(kl(d, t, inverse_prior) >= number(free_bits, ACC), through_loss, 0.0) + through_rate
        pull, stretch = d * inverse_prior, expm1(t)
        if g_mu is not None:
            tl.store(g_mu + lg_at + lcols, (b * pull).to(g_mu.dtype.element_ty), linside)
        if g_logvar is not None:
            tl.store(g_logvar + lg_at + lcols, (b * 0.5 * stretch).to(g_logvar.dtype.element_ty), linside)
        if g_prior_mu is not None:
            tl.store(g_prior_mu + lg_at + lcols, (-(b * pull)).to(g_prior_mu.dtype.element_ty), linside)
        if g_prior_logvar is not None:
            g_lp = -0.5 * b * (stretch + pull * d)
            tl.store(g_prior_logvar + lg_at + lcols, g_lp.to(g_prior_logvar.dtype.element_ty), linside)


@triton.jit
def given_gradients(
    g_log_sigma, g_beta,
    grad_loss, grad_distortion, grad_rate, stats, log_sigma, beta, capacity, through,
    grad_loss_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
    batch, grad_loss_stride, grad_distortion_stride, grad_rate_stride, log_sigma_stride, beta_stride,
    HAS_GRAD_LOSS: tl.constexpr, HAS_GRAD_DISTORTION: tl.constexpr, HAS_GRAD_RATE: tl.constexpr,
    MODE: tl.constexpr, SOFTCLIP: tl.constexpr, HAS_LOG_SIGMA: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_CAPACITY: tl.constexpr, CAPACITY_TENSOR: tl.constexpr, HAS_THROUGH: tl.constexpr,
    LOG_SIGMA_EACH: tl.constexpr, BETA_EACH: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of a given log σ and of β, O(B)."""
    log_sigma_sum, beta_sum = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    for sfirst in range(0, batch, ROWS):
        srows = sfirst + tl.arange(0, ROWS)
        _, _, _, of_log_sigma, of_beta = sample_factors(
            srows, srows < batch, grad_loss, grad_distortion, grad_rate, stats, log_sigma, beta, capacity, through,
            grad_loss_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
            batch, grad_loss_stride, grad_distortion_stride, grad_rate_stride, log_sigma_stride, beta_stride,
            HAS_GRAD_LOSS, HAS_GRAD_DISTORTION, HAS_GRAD_RATE, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
            HAS_CAPACITY, CAPACITY_TENSOR, HAS_THROUGH, ROWS, ACC,
        )  # fmt: skip
        log_sigma_sum += tl.where(srows < batch, of_log_sigma, 0.0)
        beta_sum += tl.where(srows < batch, of_beta, 0.0)
        if LOG_SIGMA_EACH and g_log_sigma is not None:
            tl.store(g_log_sigma + srows, of_log_sigma.to(g_log_sigma.dtype.element_ty), srows < batch)
        if BETA_EACH and g_beta is not None:
            tl.store(g_beta + srows, of_beta.to(g_beta.dtype.element_ty), srows < batch)
    if not LOG_SIGMA_EACH and g_log_sigma is not None:
        tl.store(g_log_sigma, tl.sum(log_sigma_sum, 0).to(g_log_sigma.dtype.element_ty))
    if not BETA_EACH and g_beta is not None:
        tl.store(g_beta, tl.sum(beta_sum, 0).to(g_beta.dtype.element_ty))


@triton.jit
def elbo_grads_kernel(
    # inputs; see elbo_stats_kernel. element_sigma: log σ inside a sample; log_sigma: one, or one per sample
    recon, target, element_sigma, mu, logvar, prior_mu, prior_logvar, free_bits: tl.float64,
    grad_loss, grad_distortion, grad_rate, stats, log_sigma, beta, capacity, through,
    log_sigma_value: tl.float64, min_log_sigma: tl.float64, beta_value: tl.float64, capacity_value: tl.float64,
    scale: tl.float64, dims_value: tl.float64, batch_value: tl.float64,
    # outputs: dense; those not wanted are None
    g_recon, g_target, g_element_sigma, g_mu, g_logvar, g_prior_mu, g_prior_logvar, g_log_sigma, g_beta,
    # shapes
    batch, data_programs, latent_programs,
    grad_loss_stride, grad_distortion_stride, grad_rate_stride, log_sigma_stride, beta_stride,
    dims, recon_stride, target_stride, data_chunks, data_tiles,
    element_stride, divisor0, size0, stride0, divisor1, size1, stride1,
    latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
    # what there is
    HAS_GRAD_LOSS: tl.constexpr, HAS_GRAD_DISTORTION: tl.constexpr, HAS_GRAD_RATE: tl.constexpr,
    MODE: tl.constexpr, SOFTCLIP: tl.constexpr, HAS_LOG_SIGMA: tl.constexpr, HAS_BETA: tl.constexpr,
    HAS_CAPACITY: tl.constexpr, CAPACITY_TENSOR: tl.constexpr, HAS_THROUGH: tl.constexpr,
    LOG_SIGMA_EACH: tl.constexpr, BETA_EACH: tl.constexpr,
    LEVELS: tl.constexpr, PRIOR: tl.constexpr, FREE_BITS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    # tunables
    DATA_VEC: tl.constexpr, DATA_ROWS: tl.constexpr, DATA_COLS: tl.constexpr,
    LATENT_VEC: tl.constexpr, LATENT_ROWS: tl.constexpr, LATENT_COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if recon is not None and pid < data_programs:  # see elbo_stats_kernel
        rows, chunk = pid // data_chunks * DATA_ROWS + tl.arange(0, DATA_ROWS), pid % data_chunks
        a, _, _, _, _ = sample_factors(
            rows, rows < batch, grad_loss, grad_distortion, grad_rate, stats, log_sigma, beta, capacity, through,
            0.0, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
            batch, grad_loss_stride, grad_distortion_stride, grad_rate_stride, log_sigma_stride, beta_stride,
            HAS_GRAD_LOSS, HAS_GRAD_DISTORTION, HAS_GRAD_RATE, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
            HAS_CAPACITY, CAPACITY_TENSOR, HAS_THROUGH, DATA_ROWS, ACC,
        )  # fmt: skip
        a = a[:, None]
        length = elements(dims, DATA_VEC, WIDE)
        r_at = row_offsets(rows, elements(recon_stride, DATA_VEC, WIDE), WIDE)
        t_at = row_offsets(rows, elements(target_stride, DATA_VEC, WIDE), WIDE)
        g_at = row_offsets(rows, length, WIDE)
        for tile in range(chunk * data_tiles, (chunk + 1) * data_tiles):
            cols = columns(tile, DATA_COLS, WIDE)
            inside = (rows < batch)[:, None] & (cols < length)
            e = tl.load(recon + r_at + cols, inside, 0.0).to(ACC) - tl.load(target + t_at + cols, inside, 0.0).to(ACC)
            g = a * e
            if MODE == ELEMENT:
                ls_at = log_sigma_at(
                    rows, cols, element_stride, divisor0, size0, stride0, divisor1, size1, stride1,
                    LEVELS, DATA_VEC, WIDE,
                )  # fmt: skip
                inverse = exp(-2.0 * tl.load(element_sigma + ls_at, inside, 0.0).to(ACC))
                g = a * (e * inverse)
                if g_element_sigma is not None:
                    g_ls = a * (1.0 - e * (e * inverse))
                    tl.store(g_element_sigma + g_at + cols, g_ls.to(g_element_sigma.dtype.element_ty), inside)
            if g_recon is not None:
                tl.store(g_recon + g_at + cols, g.to(g_recon.dtype.element_ty), inside)
            if g_target is not None:
                tl.store(g_target + g_at + cols, (-g).to(g_target.dtype.element_ty), inside)
    elif mu is not None and pid < data_programs + latent_programs:
        lpid = pid - data_programs
        lrows = lpid // latent_chunks * LATENT_ROWS + tl.arange(0, LATENT_ROWS)
        _, through_loss, through_rate, _, _ = sample_factors(
            lrows, lrows < batch, grad_loss, grad_distortion, grad_rate, stats, log_sigma, beta, capacity, through,
            0.0, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
            batch, grad_loss_stride, grad_distortion_stride, grad_rate_stride, log_sigma_stride, beta_stride,
            HAS_GRAD_LOSS, HAS_GRAD_DISTORTION, HAS_GRAD_RATE, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
            HAS_CAPACITY, CAPACITY_TENSOR, HAS_THROUGH, LATENT_ROWS, ACC,
        )  # fmt: skip
        latent_gradients(
            lpid, through_loss, through_rate, mu, logvar, prior_mu, prior_logvar, free_bits,
            g_mu, g_logvar, g_prior_mu, g_prior_logvar,
            batch, latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
            PRIOR, FREE_BITS, ACC, WIDE, LATENT_VEC, LATENT_ROWS, LATENT_COLS,
        )  # fmt: skip
    else:  # one more program for the gradients of a given log σ and of β, which are O(B)
        given_gradients(
            g_log_sigma, g_beta,
            grad_loss, grad_distortion, grad_rate, stats, log_sigma, beta, capacity, through,
            0.0, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
            batch, grad_loss_stride, grad_distortion_stride, grad_rate_stride, log_sigma_stride, beta_stride,
            HAS_GRAD_LOSS, HAS_GRAD_DISTORTION, HAS_GRAD_RATE, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
            HAS_CAPACITY, CAPACITY_TENSOR, HAS_THROUGH, LOG_SIGMA_EACH, BETA_EACH, ROWS, ACC,
        )  # fmt: skip


class Outputs(NamedTuple):
    """Where gradients go; None where one is not wanted."""

    recon: Output | None
    target: Output | None
    log_sigma: Output | None
    mu: Output | None
    logvar: Output | None
    prior_mu: Output | None
    prior_logvar: Output | None


def elbo_grads(
    inputs, stats: Tensor, knobs: Knobs, grad_outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    outputs: Outputs, g_log_sigma: Tensor | None, g_beta: Tensor | None,
) -> None:  # fmt: skip
    """Writes the outputs' buffers, and the gradients of a given log σ and of β, () or contiguous (B,)."""
    through = None
    if knobs.sigma_mode == BATCH.value and (unequal(grad_outputs[0]) or unequal(grad_outputs[1])):
        through = elbo_weights(inputs, stats, knobs, *grad_outputs[:2])
    d = inputs.data_tiles if any(o is not None for o in outputs[:3]) else None
    k = inputs.latent_tiles if any(o is not None for o in outputs[3:]) else None
    data_programs, latent_programs = (t.programs(inputs.batch) if t else 0 for t in (d, k))
    programs = data_programs + latent_programs + (g_log_sigma is not None or g_beta is not None)
    if programs == 0:
        return
    d, k, stride = d or Tiles.nothing(), k or Tiles.nothing(), inputs.strides
    with inputs.device_guard():
        elbo_grads_kernel[(programs,)](
            # inputs
            inputs.recon, inputs.target, inputs.log_sigma, inputs.mu, inputs.logvar, inputs.prior_mu,
            inputs.prior_logvar, knobs.free_bits,
            *grad_outputs, stats, knobs.log_sigma, knobs.beta, knobs.capacity, through,
            *knobs.values(inputs.batch, inputs.dims, inputs.latents),
            # outputs
            *(None if o is None else o.buffer for o in outputs), g_log_sigma, g_beta,
            # shapes
            inputs.batch, data_programs, latent_programs,
            *map(stride_of, grad_outputs), stride_of(knobs.log_sigma), stride_of(knobs.beta),
            d.length, stride("recon", d), stride("target", d), d.chunks, d.per_chunk,
            inputs.log_sigma_stride(d), *inputs.inside.arguments(),
            k.length, stride("mu", k), stride("logvar", k), stride("prior_mu", k), stride("prior_logvar", k),
            k.chunks, k.per_chunk,
            # what there is
            HAS_GRAD_LOSS=grad_outputs[0] is not None, HAS_GRAD_DISTORTION=grad_outputs[1] is not None,
            HAS_GRAD_RATE=grad_outputs[2] is not None, **knobs.present(), HAS_THROUGH=through is not None,
            LOG_SIGMA_EACH=each(knobs.log_sigma), BETA_EACH=each(knobs.beta),
            LEVELS=len(inputs.inside.levels), PRIOR=inputs.prior_mu is not None, FREE_BITS=knobs.free_bits > 0,
            ACC=inputs.triton_dtype, WIDE=inputs.wide,
            # tunables
            DATA_VEC=d.vec, DATA_ROWS=d.rows, DATA_COLS=d.cols,
            LATENT_VEC=k.vec, LATENT_ROWS=k.rows, LATENT_COLS=k.cols,
            ROWS=min(BLOCK, triton.next_power_of_2(inputs.batch)),
            num_warps=inputs.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
