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

from fused_elbo.call import Gradients, Outputs

from ._elements import difference, from_units, row_offsets
from ._factors import BATCH, ELEMENT, IMAGE, factors
from ._grid import arrive, barrier_of, grid_barrier, sum_of
from ._layout import Inputs, Tiles, cdiv, power_of_2
from .elbo_finalize import BLOCK, blocks, elbo_finalize_kernel, empty_outputs, row_sums
from .elbo_grads import latent_gradients, scalar_gradients
from .elbo_stats import empty_partials, latent_sums
from .structs import ABSENT, Batch, GradOutputs, Options, Scalar, Sums

THREADS = 1024  # of a program at most: its registers are then limited to 64 a thread, and one always fits on an SM
HELD = 16  # differences of a tile in the registers of a thread at most
SMALLEST = 2048  # elements of a tile; smaller ones have no work for the threads of a program


@triton.jit
def tile_of(pid, data, batch):
    """(chunks, samples, columns, mask): a row of a tile is a chunk of a sample. Past the data all is masked."""
    chunks = pid * data.ROWS + tl.arange(0, data.ROWS)
    rows = chunks // data.chunks
    cols = row_offsets(chunks % data.chunks, data.COLS, batch.WIDE) + tl.arange(0, data.COLS)[None, :]
    length = from_units(data.length, data.VEC, batch.WIDE)
    return chunks, rows, cols, (rows < batch.size)[:, None] & (cols < length)


@triton.jit
def differences(pid, data, partials, batch):
    """(e, Σe² of each row)."""
    chunks, rows, cols, inside = tile_of(pid, data, batch)
    e = difference(data, rows, cols, inside, batch)
    s = tl.sum(e * e, 1)
    tl.store(partials.s + chunks, s, rows < batch.size)
    return e, s


@triton.jit
def sums_of_samples(pid, data, partials, batch, BLOCK: tl.constexpr):
    """S of each row's sample, from what all programs have written of it."""
    _, rows, _, _ = tile_of(pid, data, batch)
    return row_sums(partials.s, rows, batch.size, data.chunks, data.ROWS, BLOCK, batch.ACC)


@triton.jit
def data_gradients(pid, e, sums, data, opts, grad_outputs, gradients, batch):
    _, rows, cols, inside = tile_of(pid, data, batch)
    own = factors(rows, sums, opts, grad_outputs, batch)
    g = own.recon_scale[:, None] * e
    g_at = row_offsets(rows, from_units(data.length, data.VEC, batch.WIDE), batch.WIDE) + cols
    if gradients.recon is not None:
        tl.store(gradients.recon + g_at, g.to(gradients.recon.dtype.element_ty), inside)
    if gradients.target is not None:
        tl.store(gradients.target + g_at, (-g).to(gradients.target.dtype.element_ty), inside)


@triton.jit
def elbo_step_kernel(
    # inputs; only the loss has a grad_output
    data, latents, opts, grad_outputs,
    # outputs; gradients: dense, those that are not wanted are None
    outputs, gradients,
    # workspace
    partials, totals, barrier,
    # shapes
    batch, latent_programs,
    # what there is, and tunables
    WAITS: tl.constexpr, ROWS: tl.constexpr, DATA_COLS: tl.constexpr, LATENT_COLS: tl.constexpr,
    SAMPLES: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    # The latents from the last program on: those past the data have nothing else to do.
    clamped_total, total = tl.zeros((), batch.ACC), tl.zeros((), batch.ACC)
    for lpid in range(programs - 1 - pid, latent_programs, programs):
        clamped_total += latent_sums(lpid, latents, partials, batch)

    # Programs that wait hold two tiles. (One of twice the size is loaded with so much in flight that registers spill.)
    TILES: tl.constexpr = 2 if WAITS else 1
    e, s = differences(pid * TILES, data, partials, batch)
    if WAITS:
        e1, s1 = differences(pid * TILES + 1, data, partials, batch)
        if opts.MODE == BATCH:
            tl.store(totals + pid, tl.sum(s, 0) + tl.sum(s1, 0))
        if opts.capacity.value is not None:
            tl.store(totals + programs + pid, clamped_total)
        pid += grid_barrier(barrier, programs)
        if opts.MODE == BATCH:
            total = sum_of(totals, programs, PROGRAMS)
        if opts.capacity.value is not None:
            clamped_total = sum_of(totals + programs, programs, PROGRAMS)
        if opts.MODE == IMAGE:
            s1 = sums_of_samples(pid * TILES + 1, data, partials, batch, DATA_COLS)
        sums1 = Sums(s1, total, s1 * 0.0, clamped_total)
        data_gradients(pid * TILES + 1, e1, sums1, data, opts, grad_outputs, gradients, batch)
        if opts.MODE == IMAGE:
            s = sums_of_samples(pid * TILES, data, partials, batch, DATA_COLS)
    sums = Sums(s, total, s * 0.0, clamped_total)
    data_gradients(pid * TILES, e, sums, data, opts, grad_outputs, gradients, batch)

    for lpid in range(programs - 1 - pid, latent_programs, programs):
        lrows = lpid // latents.chunks * latents.ROWS + tl.arange(0, latents.ROWS)
        nothing = tl.zeros((latents.ROWS,), batch.ACC)
        lown = factors(lrows, Sums(nothing, total, nothing, clamped_total), opts, grad_outputs, batch)
        latent_gradients(lpid, lown.grad_kl_clamped, lown.grad_kl, latents, gradients, batch)

    if WAITS:
        finishes = pid == programs - 1
    else:
        finishes = arrive(barrier, programs)
    if finishes:
        elbo_finalize_kernel(
            partials, opts, outputs, batch, data.chunks, latents.chunks, False, ROWS, DATA_COLS, LATENT_COLS
        )
        if gradients.log_sigma is not None or gradients.beta is not None:
            tl.debug_barrier()  # other threads read stats than have written them
            scalar_gradients(outputs.stats, opts, grad_outputs, gradients, batch, SAMPLES)


class Plan(NamedTuple):
    """How a step is cut into programs."""

    data: Tiles
    latents: Tiles
    programs: int
    threads: int
    waits: bool

    @classmethod
    def of(cls, inputs: Inputs, options: Options, resident: int) -> Plan | None:
        """None where the stages must run one after another. `resident`: programs that are surely on the GPU at once.

        Where programs wait for one another, their tiles are the smallest with which `resident` programs hold the batch,
        so that it spreads over the whole GPU; the largest are of THREADS · HELD elements, two in a program.
        """
        mode, limited = options.MODE.value, options.capacity.value is not None
        if mode == ELEMENT.value or inputs.dtype == torch.float64 or not inputs.dims or not inputs.latent_dims:
            return None
        batch, largest, per_image = inputs.batch, THREADS * HELD, mode == IMAGE.value
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
        return cls(data, latents, min(programs, resident) if waits else programs, threads, waits)


def launch_options(plan: Plan) -> dict[str, Any]:
    if triton.knobs.runtime.interpret:
        return {}
    target = triton.runtime.driver.active.get_current_target()
    options = {"num_warps": plan.threads // target.warp_size, "launch_cooperative_grid": plan.waits}
    if target.backend == "cuda":  # left alone, ptxas spills some for 32 registers, so that two programs fit on an SM
        options["maxnreg"] = 64
    return options


def elbo_step(
    inputs: Inputs, batch: Batch, plan: Plan, options: Options, grad_scale: Scalar, gradients: Gradients
) -> Outputs:
    """Fills `gradients` as `elbo_grads` does."""
    d, k = plan.data, plan.latents
    outputs, partials = empty_outputs(inputs, options, per_sample=False), empty_partials(inputs, d, k)
    totals = inputs.like.new_empty(2 * plan.programs if plan.waits else 0, dtype=inputs.dtype)
    with inputs.device_guard():
        elbo_step_kernel[(plan.programs,)](
            # inputs
            inputs.data(d), inputs.latents(k), options, GradOutputs(grad_scale, ABSENT, ABSENT, None),
            # outputs
            outputs, gradients,
            # workspace
            partials, totals, barrier_of(inputs.like.device),
            # shapes
            batch, k.programs(inputs.batch),
            # what there is, and tunables
            WAITS=plan.waits, **blocks(inputs.batch, d.chunks, k.chunks, BLOCK),
            SAMPLES=min(BLOCK, power_of_2(inputs.batch)),
            PROGRAMS=max(plan.threads, power_of_2(plan.programs)),  # each value is read by one thread
            **launch_options(plan), enable_fp_fusion=False,
        )  # fmt: skip
    return outputs
