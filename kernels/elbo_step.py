"""All stages in one launch: recon and target are read once, and the slopes of their errors (for squares the differences
themselves) kept in registers until they are multiplied into gradients. 3N + 6L bytes for N of recon and L of mu, where
the stages one after another move 5N + 6L.

What the factor of a gradient needs decides how (`Plan`):

- A σ that is given, or that of an image which one program holds: the program knows the factor, and writes at once. The
  last program to arrive at a counter then does what is O(B): the loss, and the gradients of a given log σ and of β.
- A σ of the batch, or of an image that several programs share; or a capacity: the factor needs what all programs have
  summed, so they wait for one another at a grid barrier. All must be on the GPU at once (a cooperative launch), each
  with its slopes, so there is a largest batch: 32768 elements for each SM.

A σ that varies inside a sample, fp64, a limit of each sample's rate, and what is too large take the stages one after
another (`operators.step`); so does an activation before a target that has a gradient, since slopes then are two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fused_elbo.rate import of_batch

from ._elements import errors_at, from_units, row_offsets, rows_and_chunk, size, weights_at
from ._factors import BATCH, BATCH_CAPACITY, BATCH_FREE_NATS, ELEMENT, IMAGE, dims_of, elements_of, factors
from ._grid import arrive, grid_barrier, sum_of
from ._layout import Inputs, Tiles, cdiv, power_of_2
from ._math import power, slope, weighted, whole
from ._plan import Launch, at_most
from .elbo_finalize import BLOCK, blocks, finalize, row_sums
from .elbo_grads import latent_gradients, scalar_gradients
from .elbo_stats import first_with_extra_error, latent_sums
from .structs import Blocks, Layout, Options, Sums, constant

THREADS = 1024  # of a program at most: its registers are then limited to 64 a thread, and one always fits on an SM
HELD = 16  # differences of a tile in the registers of a thread at most
SMALLEST = 2048  # elements of a tile; smaller ones have no work for the threads of a program


@triton.jit
def tile_of(pid, call):
    """(chunks, samples, columns, mask): a row of a tile is a chunk of a sample. Past the data all is masked."""
    chunks = pid * call.data.tiles.ROWS + tl.arange(0, call.data.tiles.ROWS)
    rows = chunks // whole(call.data.tiles.chunks)
    first = row_offsets(chunks % whole(call.data.tiles.chunks), call.data.tiles.COLS, call.batch.WIDE)
    cols = first + tl.arange(0, call.data.tiles.COLS)[None, :]
    length = from_units(call.data.tiles.length, call.data.tiles.VEC, call.batch.WIDE)
    return chunks, rows, cols, (rows < size(call))[:, None] & (cols < length)


@triton.jit
def slopes(pid, call, partials):
    """Returns what a gradient has of each element; and of each row A and the sum of the weights."""
    chunks, rows, cols, inside = tile_of(pid, call)
    e, dx_dy = errors_at(call, rows, cols, inside)
    of_each, u = power(e, call.options.Q), slope(e, call.options.Q)
    if call.data.ACTIVATION is not None:
        u = u * dx_dy
    weights = tl.zeros((call.data.tiles.ROWS,), call.batch.ACC)
    if call.data.weight.stride is not None:
        m = weights_at(call, rows, cols, inside)
        of_each, u = weighted(m, of_each), weighted(m, u)
        weights = tl.sum(m, 1)
        tl.store(partials.weights + chunks, weights, rows < size(call))
    a = first_with_extra_error(tl.sum(of_each, 1), rows, chunks % whole(call.data.tiles.chunks), call)
    tl.store(partials.a + chunks, a, rows < size(call))
    return u, a, weights


@triton.jit
def sums_of_samples(pid, call, partials, BLOCK: tl.constexpr):
    """A of each row's sample, and the sum of its weights, from what all programs have written of it."""
    _, rows, _, _ = tile_of(pid, call)
    a = row_sums(partials.a, rows, call, call.data.tiles, call.data.tiles.ROWS, BLOCK)
    weights = a
    if partials.weights is not None:
        weights = row_sums(partials.weights, rows, call, call.data.tiles, call.data.tiles.ROWS, BLOCK)
    return a, weights


@triton.jit
def held_gradients(pid, u, a, weights, of_batch, call, given, gradients):
    """Writes those of a tile. `of_batch`: Σ A, the clamped KL and the weights of the batch, where they are known."""
    _, rows, cols, inside = tile_of(pid, call)
    dims = dims_of(call)
    if call.data.weight.stride is not None:
        dims = weights
    own = factors(rows, Sums(a, of_batch[0], a * 0.0, of_batch[1], dims, of_batch[2]), given, call)
    g = own.recon_scale[:, None] * u
    length = from_units(call.data.tiles.length, call.data.tiles.VEC, call.batch.WIDE)
    g_at = row_offsets(rows, length, call.batch.WIDE) + cols
    if gradients.recon is not None:
        tl.store(gradients.recon + g_at, g.to(gradients.recon.dtype.element_ty), inside)
    if gradients.target is not None:
        tl.store(gradients.target + g_at, (-g).to(gradients.target.dtype.element_ty), inside)


class How(NamedTuple):
    """A `Cut`, as a kernel is told of it."""

    WAITS: tl.constexpr
    COUNTED: tl.constexpr  # whether the sum of the batch's weights is needed for a gradient
    SAMPLES: tl.constexpr  # that scalar_gradients takes at a time
    PROGRAMS: tl.constexpr  # the least power of 2 that is no less
    blocks: Blocks


@triton.jit
def elbo_step_kernel(
    # inputs, and shapes; only the loss has a grad_output
    call, given,
    # outputs; gradients that are not wanted are None
    written,
    workspace,
    # tunables
    how,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    # The latents from the last program on: those past the data have nothing else to do.
    clamped_total, total, elements = tl.zeros((), call.batch.ACC), tl.zeros((), call.batch.ACC), elements_of(call)
    for lpid in range(programs - 1 - pid, whole(call.latents.tiles.programs), programs):
        clamped_total += latent_sums(lpid, call, workspace.partials)

    # Programs that wait hold two tiles. (One of twice the size is loaded with so much in flight that registers spill.)
    TILES: tl.constexpr = 2 if how.WAITS else 1
    LIMITED: tl.constexpr = call.options.LIMIT == BATCH_CAPACITY or call.options.LIMIT == BATCH_FREE_NATS
    COUNTED: tl.constexpr = how.COUNTED
    u, a, weights = slopes(pid * TILES, call, workspace.partials)
    if how.WAITS:
        u1, a1, weights1 = slopes(pid * TILES + 1, call, workspace.partials)
        if call.options.MODE == BATCH:
            tl.store(workspace.totals + pid, tl.sum(a, 0) + tl.sum(a1, 0))
        if LIMITED:
            tl.store(workspace.totals + programs + pid, clamped_total)
        if COUNTED:
            tl.store(workspace.totals + 2 * programs + pid, tl.sum(weights, 0) + tl.sum(weights1, 0))
        pid += grid_barrier(workspace.barrier, programs)
        if call.options.MODE == BATCH:
            total = sum_of(workspace.totals, programs, how.PROGRAMS)
        if LIMITED:
            clamped_total = sum_of(workspace.totals + programs, programs, how.PROGRAMS)
        if COUNTED:
            elements = sum_of(workspace.totals + 2 * programs, programs, how.PROGRAMS)
        if call.options.MODE == IMAGE:
            a1, weights1 = sums_of_samples(pid * TILES + 1, call, workspace.partials, how.blocks.DATA)
        of_batch1 = (total, clamped_total, elements)
        held_gradients(pid * TILES + 1, u1, a1, weights1, of_batch1, call, given, written.gradients)
        if call.options.MODE == IMAGE:
            a, weights = sums_of_samples(pid * TILES, call, workspace.partials, how.blocks.DATA)
    of_batch = (total, clamped_total, elements)
    held_gradients(pid * TILES, u, a, weights, of_batch, call, given, written.gradients)

    for lpid in range(programs - 1 - pid, whole(call.latents.tiles.programs), programs):
        lrows, _ = rows_and_chunk(lpid, call.latents.tiles)
        nothing = tl.zeros((call.latents.tiles.ROWS,), call.batch.ACC)
        lown = factors(lrows, Sums(nothing, total, nothing, clamped_total, dims_of(call), elements), given, call)
        latent_gradients(lpid, lown.grad_kl_clamped, lown.grad_kl, call, written.gradients)

    if how.WAITS:
        finishes = pid == programs - 1
    else:
        finishes = arrive(workspace.barrier, programs)
    if finishes:
        finalize(call, workspace.partials, written.outputs, how.blocks)
        if (
            written.gradients.log_sigma is not None
            or written.gradients.beta is not None
            or written.gradients.extra_error is not None
        ):
            tl.debug_barrier()  # other threads read stats than have written them
            scalar_gradients(written.outputs.stats, call, given, written.gradients, how.SAMPLES)


class Cut(NamedTuple):
    """How a step is cut into programs."""

    data: Tiles
    latents: Tiles
    programs: int
    threads: int
    waits: bool
    counted: bool  # waits for the sum of the weights

    @classmethod
    def of(cls, inputs: Inputs, options: Options, resident: int) -> Cut | None:
        """None where the stages must run one after another. `resident`: programs that are surely on the GPU at once.

        Where programs wait for one another, their tiles are the smallest with which `resident` programs hold the batch,
        so that it spreads over the whole GPU; the largest are of THREADS · HELD elements, two in a program.
        """
        mode, limit = options.MODE.value, None if options.LIMIT is None else options.LIMIT.value
        if mode == ELEMENT.value or inputs.dtype == torch.float64 or not inputs.dims or not inputs.latent_dims:
            return None
        if limit is not None and not of_batch(limit):
            return None
        batch, largest, per_image = inputs.batch, THREADS * HELD, mode == IMAGE.value
        counted = inputs.weight is not None and (mode == BATCH.value or options.MEAN is not None)
        limited = limit is not None or counted
        whole = per_image and inputs.dims <= largest and not limited
        waits = mode == BATCH.value or limited or (per_image and not whole)
        tile = SMALLEST if waits else max(2 * SMALLEST, power_of_2(inputs.dims) if whole else 0)
        data = inputs.tiles_of_data(Tiles.of_chunks, tile, whole)
        while waits and cdiv(data.programs(batch), 2) > resident:
            tile *= 2
            if tile > largest:
                return None
            data = inputs.tiles_of_data(Tiles.of_chunks, tile, whole)
        threads = min(THREADS, tile // (8 if waits else 16))
        wide = 4 if inputs.prior_mu is not None else 16 // inputs.mu.element_size()
        latents = inputs.tiles_of_latents(Tiles.of, wide * threads)
        programs = cdiv(data.programs(batch), 2 if waits else 1) + latents.programs(batch)
        return cls(data, latents, min(programs, resident) if waits else programs, threads, waits, counted)


def launch_options(inputs: Inputs, cut: Cut) -> dict[str, Any]:
    if triton.knobs.runtime.interpret:
        return {}
    target = triton.runtime.driver.active.get_current_target()
    warps = cut.threads // target.warp_size
    # Programs that wait are one to an SM, which has registers for what more than squares need.
    registers = 65536 // cut.threads if cut.waits and not inputs.is_plain else 64
    return {"num_warps": warps, "launch_cooperative_grid": cut.waits, **at_most(registers)}


def elbo_step(inputs: Inputs, layout: Layout, cut: Cut) -> Launch:
    """A launch of (call, grad_outputs, written, workspace)."""
    samples = min(BLOCK, power_of_2(inputs.batch))
    programs = max(cut.threads, power_of_2(cut.programs))  # so that each value is read by one thread
    how = How(
        *map(constant, (cut.waits, cut.counted, samples, programs)), blocks(inputs.batch, cut.data, cut.latents, False)
    )
    return Launch(elbo_step_kernel, cut.programs, layout, how, **launch_options(inputs, cut), enable_fp_fusion=False)
