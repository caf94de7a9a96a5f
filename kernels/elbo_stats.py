"""Stage one: S_i = Σ_d e² (or Σ_d [e²/σ_d² + 2 log σ_d]) and KL_i, as partial sums of (sample, chunk)."""

import torch
import triton
import triton.language as tl

from ._layout import Tiles
from ._math import at_least, exp, kl, number


@triton.jit
def elements(units, VEC: tl.constexpr, WIDE: tl.constexpr):
    """A length or a stride that came in units of VEC. It may fit 32 bits in units only."""
    if WIDE:
        n = tl.full((), units, tl.int64) * VEC
    else:
        n = units * VEC
    return n


@triton.jit
def row_offsets(rows, stride, WIDE: tl.constexpr):
    if WIDE:
        offsets = rows.to(tl.int64)[:, None] * stride
    else:
        offsets = rows[:, None] * stride
    return offsets


@triton.jit
def columns(tile, COLS: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        cols = tl.full((), tile, tl.int64) * COLS + tl.arange(0, COLS)
    else:
        cols = tile * COLS + tl.arange(0, COLS)
    return cols[None, :]


@triton.jit
def log_sigma_at(
    rows, cols, stride, divisor0, size0, stride0, divisor1, size1, stride1,
    LEVELS: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where a tile's log σ lie, if σ varies inside a sample: as the data, or by the strides of `_layout.Inside`."""
    if LEVELS == 0:
        return row_offsets(rows, elements(stride, VEC, WIDE), WIDE) + cols
    else:
        inside = cols // divisor0 % size0 * stride0
        if LEVELS == 2:
            inside += cols // divisor1 % size1 * stride1
        return row_offsets(rows, stride, WIDE) + inside


@triton.jit
def latent_sums(
    lpid, mu, logvar, prior_mu, prior_logvar, free_bits, kl_partials, clamped_partials,
    batch, latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
    PRIOR: tl.constexpr, FREE_BITS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    LATENT_VEC: tl.constexpr, LATENT_ROWS: tl.constexpr, LATENT_COLS: tl.constexpr,
):  # fmt: skip
    """KL of the lpid-th chunk of the latents. Returns the sum of all, each at least free_bits."""
    lrows, lchunk = lpid // latent_chunks * LATENT_ROWS + tl.arange(0, LATENT_ROWS), lpid % latent_chunks
    llength = elements(latents, LATENT_VEC, WIDE)
    m_at = row_offsets(lrows, elements(mu_stride, LATENT_VEC, WIDE), WIDE)
    l_at = row_offsets(lrows, elements(logvar_stride, LATENT_VEC, WIDE), WIDE)
    rate = tl.zeros((LATENT_ROWS, LATENT_COLS), ACC)
    clamped = tl.zeros((LATENT_ROWS, LATENT_COLS), ACC)
    for ltile in range(lchunk * latent_tiles, (lchunk + 1) * latent_tiles):
        lcols = columns(ltile, LATENT_COLS, WIDE)
        linside = (lrows < batch)[:, None] & (lcols < llength)
        d = tl.load(mu + m_at + lcols, linside, 0.0).to(ACC)
        t = tl.load(logvar + l_at + lcols, linside, 0.0).to(ACC)
        inverse = tl.full((LATENT_ROWS, LATENT_COLS), 1.0, ACC)
        if PRIOR:
            pm_at = row_offsets(lrows, elements(prior_mu_stride, LATENT_VEC, WIDE), WIDE)
            pl_at = row_offsets(lrows, elements(prior_logvar_stride, LATENT_VEC, WIDE), WIDE)
            p = tl.load(prior_logvar + pl_at + lcols, linside, 0.0).to(ACC)
            d = d - tl.load(prior_mu + pm_at + lcols, linside, 0.0).to(ACC)
            t = t - p
            inverse = exp(-p)
        nats = kl(d, t, inverse)
        rate += nats
        if FREE_BITS:
            clamped += tl.where(linside, at_least(nats, number(free_bits, ACC)), 0.0)
    own = lrows * latent_chunks + lchunk
    kl_sums = tl.sum(rate, 1)
    clamped_sums = kl_sums
    tl.store(kl_partials + own, kl_sums, lrows < batch)
    if FREE_BITS:
        clamped_sums = tl.sum(clamped, 1)
        tl.store(clamped_partials + own, clamped_sums, lrows < batch)
    return tl.sum(clamped_sums, 0)


@triton.jit
def elbo_stats_kernel(
    # inputs; samples are dense, `stride` apart. Lengths and strides count in units of VEC elements (see Tiles).
    recon, target, log_sigma, mu, logvar, prior_mu, prior_logvar,
    free_bits: tl.float64,
    # outputs: partial sums, [batch, chunks]
    s_partials, kl_partials, clamped_partials,
    # shapes
    batch, data_programs,
    dims, recon_stride, target_stride, data_chunks, data_tiles,
    log_sigma_stride, divisor0, size0, stride0, divisor1, size1, stride1,
    latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
    # what there is
    ELEMENT: tl.constexpr, LEVELS: tl.constexpr, PRIOR: tl.constexpr, FREE_BITS: tl.constexpr,
    ACC: tl.constexpr, WIDE: tl.constexpr,
    # tunables
    DATA_VEC: tl.constexpr, DATA_ROWS: tl.constexpr, DATA_COLS: tl.constexpr,
    LATENT_VEC: tl.constexpr, LATENT_ROWS: tl.constexpr, LATENT_COLS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    # What is absent is None, and its branch must not be compiled: `and` stops at a constant that is false.
    if recon is not None and pid < data_programs:
        rows, chunk = pid // data_chunks * DATA_ROWS + tl.arange(0, DATA_ROWS), pid % data_chunks
        length = elements(dims, DATA_VEC, WIDE)
        r_at = row_offsets(rows, elements(recon_stride, DATA_VEC, WIDE), WIDE)
        t_at = row_offsets(rows, elements(target_stride, DATA_VEC, WIDE), WIDE)
        total = tl.zeros((DATA_ROWS, DATA_COLS), ACC)
        for tile in range(chunk * data_tiles, (chunk + 1) * data_tiles):
            cols = columns(tile, DATA_COLS, WIDE)
            inside = (rows < batch)[:, None] & (cols < length)
            e = tl.load(recon + r_at + cols, inside, 0.0).to(ACC) - tl.load(target + t_at + cols, inside, 0.0).to(ACC)
            if ELEMENT:
                ls_at = log_sigma_at(
                    rows, cols, log_sigma_stride, divisor0, size0, stride0, divisor1, size1, stride1,
                    LEVELS, DATA_VEC, WIDE,
                )  # fmt: skip
                ls = tl.load(log_sigma + ls_at, inside, 0.0).to(ACC)
                total += e * e * exp(-2.0 * ls) + 2.0 * ls
            else:
                total += e * e
        tl.store(s_partials + rows * data_chunks + chunk, tl.sum(total, 1), rows < batch)
    elif mu is not None:
        latent_sums(
            pid - data_programs, mu, logvar, prior_mu, prior_logvar, free_bits, kl_partials, clamped_partials,
            batch, latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
            PRIOR, FREE_BITS, ACC, WIDE, LATENT_VEC, LATENT_ROWS, LATENT_COLS,
        )  # fmt: skip


class Partials:
    """The output of the launch: one tensor for each sum, [batch, chunks]; `clamped` is `kl` without free bits."""

    def __init__(self, inputs, data: Tiles | None, latents: Tiles | None, free_bits: float) -> None:
        def empty(tiles: Tiles | None) -> torch.Tensor | None:
            return None if tiles is None else inputs.like.new_empty((inputs.batch, tiles.chunks), dtype=inputs.dtype)

        self.s, self.kl = empty(data), empty(latents)
        self.clamped = empty(latents) if free_bits > 0 else self.kl


def elbo_stats(inputs, free_bits: float) -> Partials:
    """`inputs`: a `_layout.Inputs`."""
    data, latents = inputs.data_tiles, inputs.latent_tiles
    partials = Partials(inputs, data, latents, free_bits)
    data_programs = data.programs(inputs.batch) if data else 0
    grid = (data_programs + (latents.programs(inputs.batch) if latents else 0),)
    stride = inputs.strides
    d, k = data or Tiles.nothing(), latents or Tiles.nothing()
    with inputs.device_guard():
        elbo_stats_kernel[grid](
            # inputs
            inputs.recon, inputs.target, inputs.log_sigma, inputs.mu, inputs.logvar, inputs.prior_mu,
            inputs.prior_logvar, free_bits,
            # outputs
            partials.s, partials.kl, partials.clamped,
            # shapes
            inputs.batch, data_programs,
            d.length, stride("recon", d), stride("target", d), d.chunks, d.per_chunk,
            inputs.log_sigma_stride(d), *inputs.inside.arguments(),
            k.length, stride("mu", k), stride("logvar", k), stride("prior_mu", k), stride("prior_logvar", k),
            k.chunks, k.per_chunk,
            # what there is
            ELEMENT=inputs.log_sigma is not None, LEVELS=len(inputs.inside.levels),
            PRIOR=inputs.prior_mu is not None, FREE_BITS=free_bits > 0,
            ACC=inputs.triton_dtype, WIDE=inputs.wide,
            # tunables
            DATA_VEC=d.vec, DATA_ROWS=d.rows, DATA_COLS=d.cols,
            LATENT_VEC=k.vec, LATENT_ROWS=k.rows, LATENT_COLS=k.cols,
            num_warps=inputs.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return partials
