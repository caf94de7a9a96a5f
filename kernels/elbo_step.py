"""All stages in one launch: recon and target are read once, and their differences kept in registers until they are
multiplied into gradients. 3N + 6L bytes for N of recon and L of mu, where the stages one after another move 5N + 6L.

What the factor of a gradient needs decides how (`Plan`):

- A σ that is given, or that of an image which one program holds: the program knows the factor, and writes at once. The
  last program to arrive at a counter then does what is O(B): the loss, and the gradients of a given log σ and of β.
- A σ of the batch, or of an image that several programs share; or a capacity: the factor needs what all programs have
  summed, so they wait for one another at a grid barrier. All must be on the GPU at once (a cooperative launch), each
  with its differences, so there is a largest batch: 32768 elements for each SM.

A σ that varies inside a sample, fp64, and what is too large take the stages one after another (`operators.step`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._elements import difference, from_units, row_offsets, rows_and_chunk, size
from ._factors import BATCH, ELEMENT, IMAGE, factors
from ._grid import arrive, grid_barrier, sum_of
from ._layout import Inputs, Tiles, cdiv, power_of_2
from ._math import whole
from ._plan import Launch, at_most
from .elbo_finalize import BLOCK, blocks, finalize, row_sums
from .elbo_grads import latent_gradients, scalar_gradients
from .elbo_stats import latent_sums
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
def differences(pid, call):
    _, rows, cols, inside = tile_of(pid, call)
    return difference(call, rows, cols, inside)


@triton.jit
def sums_of_rows(pid, e, call, partials):
    chunks, rows, _, _ = tile_of(pid, call)
    s = tl.sum(e * e, 1)
    tl.store(partials.s + chunks, s, rows < size(call))
    return s


@triton.jit
def sums_of_samples(pid, call, partials, BLOCK: tl.constexpr):
    """S of each row's sample, from what all programs have written of it."""
    _, rows, _, _ = tile_of(pid, call)
    return row_sums(partials.s, rows, call, call.data.tiles, call.data.tiles.ROWS, BLOCK)


@triton.jit
def held_gradients(pid, e, sums, call, given, gradients):
    _, rows, cols, inside = tile_of(pid, call)
    own = factors(rows, sums, given, call)
    g = own.recon_scale[:, None] * e
    length = from_units(call.data.tiles.length, call.data.tiles.VEC, call.batch.WIDE)
    g_at = row_offsets(rows, length, call.batch.WIDE) + cols
    if gradients.recon is not None:
        tl.store(gradients.recon + g_at, g.to(gradients.recon.dtype.element_ty), inside)
    if gradients.target is not None:
        tl.store(gradients.target + g_at, (-g).to(gradients.target.dtype.element_ty), inside)


@triton.jit
def agreed_gradients(pid, e, sums, call, given, partials, gradients, BLOCK: tl.constexpr):
    """Those of a tile of programs that have waited. sums.s: of the rows, not yet of an image in several of them."""
    if call.options.MODE == IMAGE:
        s = sums_of_samples(pid, call, partials, BLOCK)
        held_gradients(pid, e, Sums(s, sums.total, sums.clamped, sums.clamped_total), call, given, gradients)
    else:
        held_gradients(pid, e, sums, call, given, gradients)


class How(NamedTuple):
    """A `Cut`, as a kernel is told of it."""

    WAITS: tl.constexpr
    TILES: tl.constexpr  # of the data, in a program: two or three where it waits, else one
    AHEAD: tl.constexpr  # all of them are asked for before the first is added up, where threads wait for one another
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
    clamped_total, total = tl.zeros((), call.batch.ACC), tl.zeros((), call.batch.ACC)
    for lpid in range(programs - 1 - pid, whole(call.latents.tiles.programs), programs):
        clamped_total += latent_sums(lpid, call, workspace.partials)

    first = pid * how.TILES
    e = differences(first, call)
    if how.AHEAD:
        e1 = differences(first + 1, call)
        if how.TILES == 3:
            e2 = differences(first + 2, call)
    s = sums_of_rows(first, e, call, workspace.partials)
    if how.WAITS:
        if not how.AHEAD:
            e1 = differences(first + 1, call)
        s1 = sums_of_rows(first + 1, e1, call, workspace.partials)
        own_total = tl.sum(s, 0) + tl.sum(s1, 0)
        if how.TILES == 3:
            if not how.AHEAD:
                e2 = differences(first + 2, call)
            s2 = sums_of_rows(first + 2, e2, call, workspace.partials)
            own_total += tl.sum(s2, 0)
        if call.options.MODE == BATCH:
            tl.store(workspace.totals + pid, own_total)
        if call.options.capacity.PRESENT is not None:
            tl.store(workspace.totals + programs + pid, clamped_total)
        pid += grid_barrier(workspace.barrier, programs)
        if call.options.MODE == BATCH:
            total = sum_of(workspace.totals, programs, how.PROGRAMS)
        if call.options.capacity.PRESENT is not None:
            clamped_total = sum_of(workspace.totals + programs, programs, how.PROGRAMS)
        if how.TILES == 3:
            agreed_gradients(
                pid * how.TILES + 2, e2, Sums(s2, total, s2 * 0.0, clamped_total), call, given, workspace.partials,
                written.gradients, how.blocks.DATA,
            )  # fmt: skip
        agreed_gradients(
            pid * how.TILES + 1, e1, Sums(s1, total, s1 * 0.0, clamped_total), call, given, workspace.partials,
            written.gradients, how.blocks.DATA,
        )  # fmt: skip
        if call.options.MODE == IMAGE:
            s = sums_of_samples(pid * how.TILES, call, workspace.partials, how.blocks.DATA)
    sums = Sums(s, total, s * 0.0, clamped_total)
    held_gradients(pid * how.TILES, e, sums, call, given, written.gradients)

    for lpid in range(programs - 1 - pid, whole(call.latents.tiles.programs), programs):
        lrows, _ = rows_and_chunk(lpid, call.latents.tiles)
        nothing = tl.zeros((call.latents.tiles.ROWS,), call.batch.ACC)
        lown = factors(lrows, Sums(nothing, total, nothing, clamped_total), given, call)
        latent_gradients(lpid, lown.grad_kl_clamped, lown.grad_kl, call, written.gradients)

    if how.WAITS:
        finishes = pid == programs - 1
    else:
        finishes = arrive(workspace.barrier, programs)
    if finishes:
        finalize(call, workspace.partials, written.outputs, how.blocks)
        if written.gradients.log_sigma is not None or written.gradients.beta is not None:
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

    @classmethod
    def of(cls, inputs: Inputs, options: Options, resident: int) -> Cut | None:
        """None where the stages must run one after another. `resident`: programs that are surely on the GPU at once.

        Where programs wait for one another, each holds two tiles, or three, and the least that let `resident` programs
        hold the batch: it spreads over the whole GPU, though a tile's size is a power of 2. The largest tiles are of
        THREADS · HELD elements, two in a program. (One of twice the size is loaded with so much in flight that
        registers spill.)
        """
        mode, limited = options.MODE.value, options.capacity.PRESENT is not None
        if mode == ELEMENT.value or inputs.dtype == torch.float64 or not inputs.dims or not inputs.latent_dims:
            return None
        batch, largest, per_image = inputs.batch, THREADS * HELD, mode == IMAGE.value
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
        ahead = waits and threads < THREADS
        # 128 bits a thread. With a prior, 64 registers spill if they hold eight elements of each of four tensors.
        wide = 4 if inputs.prior_mu is not None and not ahead else 16 // inputs.mu.element_size()
        latents = inputs.tiles_of_latents(Tiles.of, wide * threads)
        programs = cdiv(data.programs(batch), tiles) + latents.programs(batch)
        return cls(data, latents, tiles, min(programs, resident) if waits else programs, threads, waits, ahead)


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
    constants = (cut.waits, cut.tiles, cut.ahead, samples, programs)
    how = How(*map(constant, constants), blocks(inputs.batch, cut.data, cut.latents, False))
    return Launch(elbo_step_kernel, cut.programs, layout, how, **launch_options(cut), enable_fp_fusion=False)
