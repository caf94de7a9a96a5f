"""Stage one: A_i = Σ_d |e|^q (or Σ_d [|e|^q/σ_d^q + q log σ_d]) and KL_i, as partial sums of (sample, chunk). The last
program to be done with its own does stage two."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._elements import (
    columns,
    errors_at,
    from_units,
    latents_at,
    log_sigma_at,
    rows_and_chunk,
    size,
    tiles_of,
    weights_at,
)
from ._factors import values_of
from ._grid import arrive
from ._layout import Inputs, Tiles
from ._math import at_least, kl, number, power, scaled_error, weighted, whole
from ._plan import Launch, at_most, empty
from .elbo_finalize import blocks, finalize
from .structs import Layout, Partials


@triton.jit
def chunk_rates(lrows, lchunk, call):
    """Returns the KL of each sample in a chunk of the latents: as it is, and with every element at least free_bits."""
    llength = from_units(call.latents.tiles.length, call.latents.tiles.VEC, call.batch.WIDE)
    rate = tl.zeros((call.latents.tiles.ROWS, call.latents.tiles.COLS), call.batch.ACC)
    clamped = tl.zeros((call.latents.tiles.ROWS, call.latents.tiles.COLS), call.batch.ACC)
    lfirst, lend = tiles_of(lchunk, call.latents.tiles)
    for ltile in range(lfirst, lend):
        lcols = columns(ltile, call.latents.tiles.COLS, call.batch.WIDE)
        linside = (lrows < size(call))[:, None] & (lcols < llength)
        d, t, inverse_prior_variance, _ = latents_at(call, lrows, lcols, linside)
        nats = kl(d, t, inverse_prior_variance)
        rate += nats
        if call.latents.FREE_BITS is not None:
            clamped += tl.where(linside, at_least(nats, number(call.numbers.free_bits, call.batch.ACC)), 0.0)
    kl_sums = tl.sum(rate, 1)
    clamped_sums = kl_sums
    if call.latents.FREE_BITS is not None:
        clamped_sums = tl.sum(clamped, 1)
    return kl_sums, clamped_sums


@triton.jit
def latent_sums(lpid, call, partials):
    """Writes the KL of the lpid-th chunk of the latents. Returns the sum of all, each at least free_bits."""
    lrows, lchunk = rows_and_chunk(lpid, call.latents.tiles)
    kl_sums, clamped_sums = chunk_rates(lrows, lchunk, call)
    own = lrows * whole(call.latents.tiles.chunks) + lchunk
    tl.store(partials.kl + own, kl_sums, lrows < size(call))
    if call.latents.FREE_BITS is not None:
        tl.store(partials.clamped + own, clamped_sums, lrows < size(call))
    return tl.sum(clamped_sums, 0)


@triton.jit
def first_with_extra_error(sums, rows, chunk, call):
    """Returns A of each row's chunk: what is added to a sample's A is part of its first one's."""
    if call.options.extra_error.PRESENT is not None:
        extra = values_of(call.tensors.extra_error, None, call.options.extra_error, rows, call)
        sums += tl.where(chunk == 0, extra, 0.0)
    return sums


@triton.jit
def data_sums(pid, call, partials):
    """Writes the A of the pid-th chunk of the data, and the sum of its weights."""
    rows, chunk = rows_and_chunk(pid, call.data.tiles)
    length = from_units(call.data.tiles.length, call.data.tiles.VEC, call.batch.WIDE)
    total = tl.zeros((call.data.tiles.ROWS, call.data.tiles.COLS), call.batch.ACC)
    counted = tl.zeros((call.data.tiles.ROWS, call.data.tiles.COLS), call.batch.ACC)
    first, end = tiles_of(chunk, call.data.tiles)
    for tile in range(first, end):
        cols = columns(tile, call.data.tiles.COLS, call.batch.WIDE)
        inside = (rows < size(call))[:, None] & (cols < length)
        e, _ = errors_at(call, rows, cols, inside)
        if call.data.log_sigma.stride is not None:
            of_each = scaled_error(e, log_sigma_at(call, rows, cols, inside), call.options.Q)
        else:
            of_each = power(e, call.options.Q)
        if call.data.weight.stride is not None:
            m = weights_at(call, rows, cols, inside)
            of_each = weighted(m, of_each)
            counted += m
        total += of_each
    own = rows * whole(call.data.tiles.chunks) + chunk
    tl.store(partials.a + own, first_with_extra_error(tl.sum(total, 1), rows, chunk, call), rows < size(call))
    if call.data.weight.stride is not None:
        tl.store(partials.weights + own, tl.sum(counted, 1), rows < size(call))


@triton.jit
def elbo_stats_kernel(
    # inputs, and shapes
    call,
    # outputs
    outputs,
    # workspace
    partials, counter,
    # a tunable
    blocks,
):  # fmt: skip
    pid, data_programs = tl.program_id(0), whole(call.data.tiles.programs)
    # What is absent is None, and its branch must not be compiled: `and` stops at a constant that is false.
    if call.data.recon is not None and pid < data_programs:
        data_sums(pid, call, partials)
    elif call.latents.mu is not None:
        latent_sums(pid - data_programs, call, partials)
    if arrive(counter, tl.num_programs(0)):
        finalize(call, partials, outputs, blocks)


class EmptyPartials:
    """Makes the partial sums of a call."""

    def __init__(self, inputs: Inputs, data: Tiles | None, latents: Tiles | None, device: torch.device) -> None:
        def of(tiles: Tiles | None) -> Callable[[], Tensor | None]:
            return nothing if tiles is None else empty((inputs.batch, tiles.chunks), inputs.dtype, device)

        self._a, self._kl = of(data), of(latents)
        self._weights = nothing if inputs.weight is None else self._a
        self._clamped = self._kl if inputs.free_bits else nothing

    def __call__(self) -> Partials:
        return Partials(self._a(), self._weights(), self._kl(), self._clamped())


def nothing() -> None:
    return None


def elbo_stats(inputs: Inputs, layout: Layout, per_sample: bool) -> Launch:
    """A launch of (call, outputs, partials, counter)."""
    tiles = inputs.data_tiles, inputs.latent_tiles
    programs = sum(t.programs(inputs.batch) for t in tiles if t is not None)
    loops = any(t.per_chunk > 1 for t in tiles if t is not None)
    # Left alone, ptxas spills in loops, and for a σ of each pixel. What is looked up by its index, and what stands
    # before the loss, takes registers of its own. For a half dtype, looked up for without a loop, ptxas takes fewer if
    # left alone, and spills none.
    in_halves = inputs.recon is not None and inputs.recon.element_size() == 2
    alone = not loops and inputs.is_plain and (inputs.log_sigma is None or (in_halves and inputs.runs))
    most = 80 if not inputs.is_plain else 72 if inputs.runs else 64
    registers = {} if alone or inputs.dtype == torch.float64 else at_most(most)
    return Launch(
        elbo_stats_kernel, programs, layout, blocks(inputs.batch, *tiles, per_sample),
        num_warps=inputs.num_warps, **registers, enable_fp_fusion=False,
    )  # fmt: skip
