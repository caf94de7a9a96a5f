"""Stage one: S_i = Σ_d e² (or Σ_d [e²/σ_d² + 2 log σ_d]) and KL_i, as partial sums of (sample, chunk)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._elements import columns, difference, from_units, latents_at, log_sigma_at
from ._layout import Inputs, Tiles
from ._math import at_least, kl, number, scaled_error
from .structs import Batch, Partials


@triton.jit
def latent_sums(lpid, latents, partials, batch):
    """Writes the KL of the lpid-th chunk of the latents. Returns the sum of all, each at least free_bits."""
    lrows, lchunk = lpid // latents.chunks * latents.ROWS + tl.arange(0, latents.ROWS), lpid % latents.chunks
    llength = from_units(latents.length, latents.VEC, batch.WIDE)
    rate = tl.zeros((latents.ROWS, latents.COLS), batch.ACC)
    clamped = tl.zeros((latents.ROWS, latents.COLS), batch.ACC)
    for ltile in range(lchunk * latents.per_chunk, (lchunk + 1) * latents.per_chunk):
        lcols = columns(ltile, latents.COLS, batch.WIDE)
        linside = (lrows < batch.size)[:, None] & (lcols < llength)
        d, t, inverse_prior_variance = latents_at(latents, lrows, lcols, linside, batch)
        nats = kl(d, t, inverse_prior_variance)
        rate += nats
        if latents.free_bits is not None:
            clamped += tl.where(linside, at_least(nats, number(latents.free_bits, batch.ACC)), 0.0)
    own = lrows * latents.chunks + lchunk
    kl_sums = tl.sum(rate, 1)
    clamped_sums = kl_sums
    tl.store(partials.kl + own, kl_sums, lrows < batch.size)
    if latents.free_bits is not None:
        clamped_sums = tl.sum(clamped, 1)
        tl.store(partials.clamped + own, clamped_sums, lrows < batch.size)
    return tl.sum(clamped_sums, 0)


@triton.jit
def elbo_stats_kernel(data, latents, partials, batch, data_programs):
    pid = tl.program_id(0)
    # What is absent is None, and its branch must not be compiled: `and` stops at a constant that is false.
    if data.recon is not None and pid < data_programs:
        rows, chunk = pid // data.chunks * data.ROWS + tl.arange(0, data.ROWS), pid % data.chunks
        length = from_units(data.length, data.VEC, batch.WIDE)
        total = tl.zeros((data.ROWS, data.COLS), batch.ACC)
        for tile in range(chunk * data.per_chunk, (chunk + 1) * data.per_chunk):
            cols = columns(tile, data.COLS, batch.WIDE)
            inside = (rows < batch.size)[:, None] & (cols < length)
            e = difference(data, rows, cols, inside, batch)
            if data.log_sigma.base is not None:
                total += scaled_error(e, log_sigma_at(data, rows, cols, inside, batch))
            else:
                total += e * e
        tl.store(partials.s + rows * data.chunks + chunk, tl.sum(total, 1), rows < batch.size)
    elif latents.mu is not None:
        latent_sums(pid - data_programs, latents, partials, batch)


def empty_partials(inputs: Inputs, data: Tiles | None, latents: Tiles | None) -> Partials:
    def empty(tiles: Tiles | None) -> torch.Tensor | None:
        return None if tiles is None else inputs.like.new_empty((inputs.batch, tiles.chunks), dtype=inputs.dtype)

    kl = empty(latents)
    return Partials(empty(data), kl, empty(latents) if inputs.free_bits > 0 else kl)


def elbo_stats(inputs: Inputs, batch: Batch) -> Partials:
    data, latents = inputs.data_tiles, inputs.latent_tiles
    partials = empty_partials(inputs, data, latents)
    data_programs, latent_programs = (0 if tiles is None else tiles.programs(inputs.batch) for tiles in (data, latents))
    with inputs.device_guard():
        elbo_stats_kernel[(data_programs + latent_programs,)](
            # inputs
            inputs.data(data), inputs.latents(latents),
            # outputs
            partials,
            # shapes
            batch, data_programs,
            num_warps=inputs.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return partials
