"""All stages in one launch: recon and target are read once, and the slopes of their errors (for squares the differences
themselves) kept in registers until they are multiplied into gradients. 3N + 6L bytes for N of recon and L of mu, where
the stages one after another move 5N + 6L.

What the factor of a gradient needs decides how (`Plan`):

- A σ that is given, or that of an image which one program holds: the program knows the factor, and writes at once. The
  last program to arrive at a counter then does what is O(B): the loss, and the gradients of a given log σ and of β.
- A σ of the batch, or of an image that several programs share; a limit per batch, or a mean of weights: the factor
  needs what all programs have summed, so they wait for one another at a grid barrier. All must be on the GPU at once (a
  cooperative launch), each with its slopes, so there is a largest batch: 32768 elements for each SM.

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
def errors_of(pid, call):
    """Returns x̂ − x of a tile, ∂x̂/∂y and the weights, which are 1 where there are none."""
    _, rows, cols, inside = tile_of(pid, call)
    e, dx_dy = errors_at(call, rows, cols, inside)
    m = 1.0
    if call.data.weight.stride is not None:
        m = weights_at(call, rows, cols, inside)
    return e, dx_dy, m


@triton.jit
def sums_of_rows(pid, e, dx_dy, m, call, partials):
    """Returns what a gradient has of each element; and of each row A and the sum of the weights."""
    chunks, rows, _, _ = tile_of(pid, call)
    of_each, u = power(e, call.options.Q), slope(e, call.options.Q)
    if call.data.ACTIVATION is not None:
        u = u * dx_dy
    weights = tl.zeros((call.data.tiles.ROWS,), call.batch.ACC)
    if call.data.weight.stride is not None:
        of_each, u = weighted(m, of_each), weighted(m, u)
        weights = tl.sum(m, 1)
        tl.store(partials.weights + chunks, weights, rows < size(call))
    a = first_with_extra_error(tl.sum(of_each, 1), rows, chunks % whole(call.data.tiles.chunks), call)
    tl.store(partials.a + chunks, a, rows < size(call))
    return u, a, weights


@triton.jit
def sums_of(a, weights, total, clamped_total, elements, call):
    """Returns the `structs.Sums` of the rows of a tile, of which the clamped KL counts for no gradient of data."""
    dims = dims_of(call)
    if call.data.weight.stride is not None:
        dims = weights
    return Sums(a, total, a * 0.0, clamped_total, dims, elements)


@triton.jit
def sums_of_samples(pid, sums, call, partials, BLOCK: tl.constexpr):
    """Those with A of each row's sample, and the sum of its weights, from what all programs have written of it."""
    _, rows, _, _ = tile_of(pid, call)
    a, dims = row_sums(partials.a, rows, call, call.data.tiles, call.data.tiles.ROWS, BLOCK), sums.dims
    if partials.weights is not None:
        dims = row_sums(partials.weights, rows, call, call.data.tiles, call.data.tiles.ROWS, BLOCK)
    return Sums(a, sums.total, sums.clamped, sums.clamped_total, dims, sums.elements)


@triton.jit
def held_gradients(pid, u, sums, call, given, gradients):
    _, rows, cols, inside = tile_of(pid, call)
    own = factors(rows, sums, given, call)
    g = own.recon_scale[:, None] * u
    length = from_units(call.data.tiles.length, call.data.tiles.VEC, call.batch.WIDE)
    g_at = row_offsets(rows, length, call.batch.WIDE) + cols
    if gradients.recon is not None:
        tl.store(gradients.recon + g_at, g.to(gradients.recon.dtype.element_ty), inside)
    if gradients.target is not None:
        tl.store(gradients.target + g_at, (-g).to(gradients.target.dtype.element_ty), inside)


@triton.jit
def agreed_gradients(pid, u, sums, call, given, partials, gradients, BLOCK: tl.constexpr):
    """Those of a tile of programs that have waited. sums.a: of the rows, not yet of an image in several of them."""
    if call.options.MODE == IMAGE:
        held_gradients(pid, u, sums_of_samples(pid, sums, call, partials, BLOCK), call, given, gradients)
    else:
        held_gradients(pid, u, sums, call, given, gradients)


class How(NamedTuple):
    """A `Cut`, as a kernel is told of it."""

    WAITS: tl.constexpr
    TILES: tl.constexpr  # of the data, in a program: two or three where it waits, else one
    AHEAD: tl.constexpr  # all of them are asked for before anything is added up, where threads wait for one another
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
    clamped_total, total, elements = tl.zeros((), call.batch.ACC), tl.zeros((), call.batch.ACC), elements_of(call)
    first = pid * how.TILES
    if how.AHEAD:
        e, dx_dy, m = errors_of(first, call)
        e1, dx_dy1, m1 = errors_of(first + 1, call)
        if how.TILES == 3:
            e2, dx_dy2, m2 = errors_of(first + 2, call)
    # The latents from the last program on: those past the data have nothing else to do.
    for lpid in range(programs - 1 - pid, whole(call.latents.tiles.programs), programs):
        clamped_total += latent_sums(lpid, call, workspace.partials)
    if not how.AHEAD:
        e, dx_dy, m = errors_of(first, call)
    u, a, weights = sums_of_rows(first, e, dx_dy, m, call, workspace.partials)
    if how.WAITS:
        if not how.AHEAD:
            e1, dx_dy1, m1 = errors_of(first + 1, call)
        u1, a1, weights1 = sums_of_rows(first + 1, e1, dx_dy1, m1, call, workspace.partials)
        own_total, own_elements = tl.sum(a, 0) + tl.sum(a1, 0), tl.sum(weights, 0) + tl.sum(weights1, 0)
        if how.TILES == 3:
            if not how.AHEAD:
                e2, dx_dy2, m2 = errors_of(first + 2, call)
            u2, a2, weights2 = sums_of_rows(first + 2, e2, dx_dy2, m2, call, workspace.partials)
            own_total += tl.sum(a2, 0)
            own_elements += tl.sum(weights2, 0)
        LIMITED: tl.constexpr = call.options.LIMIT == BATCH_CAPACITY or call.options.LIMIT == BATCH_FREE_NATS
        if call.options.MODE == BATCH:
            tl.store(workspace.totals + pid, own_total)
        if LIMITED:
            tl.store(workspace.totals + programs + pid, clamped_total)
        if how.COUNTED:
            tl.store(workspace.totals + 2 * programs + pid, own_elements)
        pid += grid_barrier(workspace.barrier, programs)
        if call.options.MODE == BATCH:
            total = sum_of(workspace.totals, programs, how.PROGRAMS)
        if LIMITED:
            clamped_total = sum_of(workspace.totals + programs, programs, how.PROGRAMS)
        if how.COUNTED:
            elements = sum_of(workspace.totals + 2 * programs, programs, how.PROGRAMS)
        if how.TILES == 3:
            agreed_gradients(
                pid * how.TILES + 2, u2, sums_of(a2, weights2, total, clamped_total, elements, call), call, given,
                workspace.partials, written.gradients, how.blocks.DATA,
            )  # fmt: skip
        agreed_gradients(
            pid * how.TILES + 1, u1, sums_of(a1, weights1, total, clamped_total, elements, call), call, given,
            workspace.partials, written.gradients, how.blocks.DATA,
        )  # fmt: skip
        agreed_gradients(
            pid * how.TILES, u, sums_of(a, weights, total, clamped_total, elements, call), call, given,
            workspace.partials, written.gradients, how.blocks.DATA,
        )  # fmt: skip
    else:
        own = sums_of(a, weights, total, clamped_total, elements, call)
        held_gradients(pid * how.TILES, u, own, call, given, written.gradients)

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
    tiles: int  # of the data, in a program
    programs: int
    threads: int
    waits: bool
    ahead: bool  # see How; a program of THREADS asks for enough by one tile, and has no registers for more
    counted: bool  # see How

    @classmethod
    def of(cls, inputs: Inputs, options: Options, resident: int) -> Cut | None:
        """None where the stages must run one after another. `resident`: programs that are surely on the GPU at once.

        Where programs wait for one another, each holds two tiles, or three, and the least that let `resident` programs
        hold the batch: it spreads over the whole GPU, though a tile's size is a power of 2. The largest tiles are of
        THREADS · HELD elements, two in a program. (One of twice the size is loaded with so much in flight that
        registers spill.)
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
        tiles = 2 if waits else 1
        while waits and cdiv(data.programs(batch), tiles) > resident:
            tile, tiles = (tile, 3) if tiles == 2 else (2 * tile, 2)
            if tile * tiles > 2 * largest:
                return None
            data = inputs.tiles_of_data(Tiles.of_chunks, tile, whole)
        threads = min(THREADS, tile // (8 if waits else 16))
        ahead = waits and threads < THREADS and inputs.is_plain
        # 128 bits a thread. With a prior, 64 registers spill if they hold eight elements of each of four tensors.
        wide = 4 if inputs.prior_mu is not None and not ahead else 16 // inputs.mu.element_size()
        latents = inputs.tiles_of_latents(Tiles.of, wide * threads)
        programs = cdiv(data.programs(batch), tiles) + latents.programs(batch)
        return cls(data, latents, tiles, min(programs, resident) if waits else programs, threads, waits, ahead, counted)


def launch_options(cut: Cut) -> dict[str, Any]:
    if triton.knobs.runtime.interpret:
        return {}
    target = triton.runtime.driver.active.get_current_target()
    warps = cut.threads // target.warp_size
    registers = min(255, 64 * THREADS // cut.threads) if cut.waits else 64  # one program on an SM, or several
    return {"num_warps": warps, "launch_cooperative_grid": cut.waits, **at_most(registers)}


def elbo_step(inputs: Inputs, layout: Layout, cut: Cut) -> Launch:
    """A launch of (call, grad_outputs, written, workspace)."""
    samples = min(BLOCK, power_of_2(inputs.batch))
    programs = max(cut.threads, power_of_2(cut.programs))  # so that each value is read by one thread
    constants = (cut.waits, cut.tiles, cut.ahead, cut.counted, samples, programs)
    how = How(*map(constant, constants), blocks(inputs.batch, cut.data, cut.latents, False, least=8))
    return Launch(elbo_step_kernel, cut.programs, layout, how, **launch_options(cut), enable_fp_fusion=False)
