"""Stage one: S_i = Σ_d e² (or Σ_d [e²/σ_d² + 2 log σ_d]) and KL_i, as partial sums of (sample, chunk). The last program
to be done with its own does stage two."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._elements import columns, difference, from_units, latents_at, log_sigma_at, rows_and_chunk
from ._grid import arrive
from ._layout import Inputs, Tiles
from ._math import at_least, kl, number, scaled_error
from ._plan import Launch, empty
from ._unpack import batch_of, data_of, latents_of, options_of
from .elbo_finalize import blocks, finalize
from .structs import Layout, Partials


@triton.jit
def latent_sums(lpid, latents, partials, batch):
    """Writes the KL of the lpid-th chunk of the latents. Returns the sum of all, each at least free_bits."""
    lrows, lchunk = rows_and_chunk(lpid, latents.tiles)
    llength = from_units(latents.tiles.length, latents.tiles.VEC, batch.WIDE)
    rate = tl.zeros((latents.tiles.ROWS, latents.tiles.COLS), batch.ACC)
    clamped = tl.zeros((latents.tiles.ROWS, latents.tiles.COLS), batch.ACC)
    for ltile in range(lchunk * latents.tiles.per_chunk, (lchunk + 1) * latents.tiles.per_chunk):
        lcols = columns(ltile, latents.tiles.COLS, batch.WIDE)
        linside = (lrows < batch.size)[:, None] & (lcols < llength)
        d, t, inverse_prior_variance = latents_at(latents, lrows, lcols, linside, batch)
        nats = kl(d, t, inverse_prior_variance)
        rate += nats
        if latents.free_bits is not None:
            clamped += tl.where(linside, at_least(nats, number(latents.free_bits, batch.ACC)), 0.0)
    own = lrows * latents.tiles.chunks + lchunk
    kl_sums = tl.sum(rate, 1)
    clamped_sums = kl_sums
    tl.store(partials.kl + own, kl_sums, lrows < batch.size)
    if latents.free_bits is not None:
        clamped_sums = tl.sum(clamped, 1)
        tl.store(partials.clamped + own, clamped_sums, lrows < batch.size)
    return tl.sum(clamped_sums, 0)


@triton.jit
def data_sums(pid, data, partials, batch):
    """Writes the S of the pid-th chunk of the data."""
    rows, chunk = rows_and_chunk(pid, data.tiles)
    length = from_units(data.tiles.length, data.tiles.VEC, batch.WIDE)
    total = tl.zeros((data.tiles.ROWS, data.tiles.COLS), batch.ACC)
    for tile in range(chunk * data.tiles.per_chunk, (chunk + 1) * data.tiles.per_chunk):
        cols = columns(tile, data.tiles.COLS, batch.WIDE)
        inside = (rows < batch.size)[:, None] & (cols < length)
        e = difference(data, rows, cols, inside, batch)
        if data.log_sigma.stride is not None:
            total += scaled_error(e, log_sigma_at(data, rows, cols, inside, batch))
        else:
            total += e * e
    tl.store(partials.s + rows * data.tiles.chunks + chunk, tl.sum(total, 1), rows < batch.size)


@triton.jit
def all_sums(data, latents, opts, outputs, partials, counter, batch, blocks):
    pid = tl.program_id(0)
    # What is absent is None, and its branch must not be compiled: `and` stops at a constant that is false.
    if data.recon.stride is not None and pid < data.tiles.programs:
        data_sums(pid, data, partials, batch)
    elif latents.mu.stride is not None:
        latent_sums(pid - data.tiles.programs, latents, partials, batch)
    if arrive(counter, tl.num_programs(0)):
        finalize(partials, data.tiles, latents.tiles, opts, outputs, batch, blocks)


@triton.jit
def elbo_stats_kernel(
    # inputs
    tensors, numbers,
    # outputs
    outputs,
    # workspace
    partials, counter,
    # shapes, and tunables
    layout, blocks,
):  # fmt: skip
    all_sums(
        data_of(tensors, layout), latents_of(tensors, numbers, layout), options_of(tensors, numbers, layout),
        outputs, partials, counter, batch_of(layout), blocks,
    )  # fmt: skip


class EmptyPartials:
    """Makes the partial sums of a call."""

    def __init__(self, inputs: Inputs, data: Tiles | None, latents: Tiles | None, device: torch.device) -> None:
        def of(tiles: Tiles | None) -> Callable[[], Tensor | None]:
            return nothing if tiles is None else empty((inputs.batch, tiles.chunks), inputs.dtype, device)

        self._s, self._kl = of(data), of(latents)
        self._clamped = self._kl if inputs.free_bits else nothing

    def __call__(self) -> Partials:
        return Partials(self._s(), self._kl(), self._clamped())


def nothing() -> None:
    return None


def elbo_stats(inputs: Inputs, layout: Layout, per_sample: bool) -> Launch:
    """A launch of (tensors, numbers, outputs, partials, counter)."""
    tiles = inputs.data_tiles, inputs.latent_tiles
    programs = sum(t.programs(inputs.batch) for t in tiles if t is not None)
    return Launch(
        elbo_stats_kernel, programs, layout, blocks(inputs.batch, *tiles, per_sample),
        num_warps=inputs.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
