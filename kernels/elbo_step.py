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
from torch import Tensor

from ._factors import BATCH, ELEMENT, IMAGE, factors
from ._grid import arrive, barrier_of, meet, sum_of
from ._layout import Inputs, Tiles
from .elbo_finalize import BLOCK, Knobs, Results, blocks, each, elbo_finalize_kernel, row_sums, stride_of
from .elbo_grads import Outputs, given_gradients, latent_gradients
from .elbo_stats import Partials, elements, latent_sums, row_offsets

THREADS = 1024  # of a program at most: its registers are then limited to 64 a thread, and one always fits on an SM
HELD = 16  # differences of a tile in the registers of a thread at most
SMALLEST = 2048  # elements of a tile; smaller ones have no work for the threads of a program


@triton.jit
def tile_of(pid, batch, dims, chunks, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """(pieces, samples, columns, mask): a row of a tile is a piece of a sample. Past the data all is masked."""
    pieces = pid * ROWS + tl.arange(0, ROWS)
    rows = pieces // chunks
    cols = row_offsets(pieces % chunks, COLS, WIDE) + tl.arange(0, COLS)[None, :]
    return pieces, rows, cols, (rows < batch)[:, None] & (cols < dims)


@triton.jit
def differences(
    pid, recon, target, s_partials, batch, dims, recon_stride, target_stride, chunks,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(e, Σe² of each row)."""
    pieces, rows, cols, inside = tile_of(pid, batch, dims, chunks, ROWS, COLS, WIDE)
    r_at = row_offsets(rows, recon_stride, WIDE) + cols
    t_at = row_offsets(rows, target_stride, WIDE) + cols
    e = tl.load(recon + r_at, inside, 0.0).to(ACC) - tl.load(target + t_at, inside, 0.0).to(ACC)
    s = tl.sum(e * e, 1)
    tl.store(s_partials + pieces, s, rows < batch)
    return e, s


@triton.jit
def data_gradients(
    pid, e, s, total, clamped_total, s_partials, grad_scale, log_sigma, beta, capacity,
    grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
    g_recon, g_target, batch, dims, chunks, log_sigma_stride, beta_stride,
    WAITS: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr, MODE: tl.constexpr, SOFTCLIP: tl.constexpr,
    HAS_LOG_SIGMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_CAPACITY: tl.constexpr, CAPACITY_TENSOR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _, rows, cols, inside = tile_of(pid, batch, dims, chunks, ROWS, COLS, WIDE)
    if WAITS and MODE == IMAGE:
        s = row_sums(s_partials, rows, batch, chunks, ROWS, BLOCK, ACC)
    a, _, _, _, _ = factors(
        rows, rows < batch, s, total, s * 0.0, clamped_total, grad_scale, None, None, log_sigma, beta, capacity, None,
        grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
        0, 0, 0, log_sigma_stride, beta_stride, HAS_GRAD_SCALE, False, False, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
        HAS_CAPACITY, CAPACITY_TENSOR, False, ROWS, ACC,
    )  # fmt: skip
    g, g_at = a[:, None] * e, row_offsets(rows, dims, WIDE) + cols
    if g_recon is not None:
        tl.store(g_recon + g_at, g.to(g_recon.dtype.element_ty), inside)
    if g_target is not None:
        tl.store(g_target + g_at, (-g).to(g_target.dtype.element_ty), inside)


@triton.jit
def elbo_step_kernel(
    # inputs; see elbo_stats_kernel
    recon, target, mu, logvar, prior_mu, prior_logvar, free_bits: tl.float64,
    grad_scale, log_sigma, beta, capacity,
    grad_scale_value: tl.float64,
    log_sigma_value: tl.float64, min_log_sigma: tl.float64, beta_value: tl.float64, capacity_value: tl.float64,
    scale: tl.float64, dims_value: tl.float64, batch_value: tl.float64,
    # outputs: dense; gradients that are not wanted are None
    loss, distortion, rate, sigma, stats,
    g_recon, g_target, g_mu, g_logvar, g_prior_mu, g_prior_logvar, g_log_sigma, g_beta,
    # workspace
    s_partials, kl_partials, clamped_partials, totals, barrier,
    # shapes
    batch, latent_programs, log_sigma_stride, beta_stride,
    dims, recon_stride, target_stride, data_chunks,
    latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
    # what there is
    WAITS: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr, MODE: tl.constexpr, SOFTCLIP: tl.constexpr,
    HAS_LOG_SIGMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_CAPACITY: tl.constexpr, CAPACITY_TENSOR: tl.constexpr,
    SIGMA_PER_SAMPLE: tl.constexpr, LOG_SIGMA_EACH: tl.constexpr, BETA_EACH: tl.constexpr,
    PRIOR: tl.constexpr, FREE_BITS: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
    # tunables
    DATA_VEC: tl.constexpr, DATA_ROWS: tl.constexpr, DATA_COLS: tl.constexpr,
    LATENT_VEC: tl.constexpr, LATENT_ROWS: tl.constexpr, LATENT_COLS: tl.constexpr,
    ROWS: tl.constexpr, DATA_BLOCK: tl.constexpr, LATENT_BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    # The latents from the last program on: those past the data have nothing else to do.
    clamped_total, total = tl.zeros((), ACC), tl.zeros((), ACC)
    for lpid in range(programs - 1 - pid, latent_programs, programs):
        clamped_total += latent_sums(
            lpid, mu, logvar, prior_mu, prior_logvar, free_bits, kl_partials, clamped_partials,
            batch, latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
            PRIOR, FREE_BITS, ACC, WIDE, LATENT_VEC, LATENT_ROWS, LATENT_COLS,
        )  # fmt: skip

    length = elements(dims, DATA_VEC, WIDE)
    recon_apart, target_apart = elements(recon_stride, DATA_VEC, WIDE), elements(target_stride, DATA_VEC, WIDE)
    # Programs that wait hold two tiles. (One of twice the size is loaded with so much in flight that registers spill.)
    TILES: tl.constexpr = 2 if WAITS else 1
    e, s = differences(
        pid * TILES, recon, target, s_partials, batch, length, recon_apart,
        target_apart, data_chunks, DATA_ROWS, DATA_COLS, ACC, WIDE,
    )  # fmt: skip
    if WAITS:
        e1, s1 = differences(
            pid * TILES + 1, recon, target, s_partials, batch, length, recon_apart,
            target_apart, data_chunks, DATA_ROWS, DATA_COLS, ACC, WIDE,
        )  # fmt: skip
        if MODE == BATCH:
            tl.store(totals + pid, tl.sum(s, 0) + tl.sum(s1, 0))
        if HAS_CAPACITY:
            tl.store(totals + programs + pid, clamped_total)
        pid += meet(barrier, programs)
        if MODE == BATCH:
            total = sum_of(totals, programs, PROGRAMS)
        if HAS_CAPACITY:
            clamped_total = sum_of(totals + programs, programs, PROGRAMS)
        data_gradients(
            pid * TILES + 1, e1, s1, total, clamped_total, s_partials, grad_scale, log_sigma, beta, capacity,
            grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value,
            batch_value, g_recon, g_target, batch, length, data_chunks, log_sigma_stride, beta_stride,
            WAITS, HAS_GRAD_SCALE, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA, HAS_CAPACITY, CAPACITY_TENSOR,
            DATA_ROWS, DATA_COLS, DATA_BLOCK, ACC, WIDE,
        )  # fmt: skip
    data_gradients(
        pid * TILES, e, s, total, clamped_total, s_partials, grad_scale, log_sigma, beta, capacity,
        grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
        g_recon, g_target, batch, length, data_chunks, log_sigma_stride, beta_stride,
        WAITS, HAS_GRAD_SCALE, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA, HAS_CAPACITY, CAPACITY_TENSOR,
        DATA_ROWS, DATA_COLS, DATA_BLOCK, ACC, WIDE,
    )  # fmt: skip

    for lpid in range(programs - 1 - pid, latent_programs, programs):
        lrows = lpid // latent_chunks * LATENT_ROWS + tl.arange(0, LATENT_ROWS)
        nothing = tl.zeros((LATENT_ROWS,), ACC)
        b = factors(
            lrows, lrows < batch, nothing, total, nothing, clamped_total,
            grad_scale, None, None, log_sigma, beta, capacity, None,
            grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value,
            batch_value, 0, 0, 0, log_sigma_stride, beta_stride, HAS_GRAD_SCALE, False, False, ELEMENT, SOFTCLIP,
            HAS_LOG_SIGMA, HAS_BETA, HAS_CAPACITY, CAPACITY_TENSOR, False, LATENT_ROWS, ACC,
        )[1]  # fmt: skip
        latent_gradients(
            lpid, b, nothing, mu, logvar, prior_mu, prior_logvar, free_bits, g_mu, g_logvar, g_prior_mu, g_prior_logvar,
            batch, latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
            PRIOR, FREE_BITS, ACC, WIDE, LATENT_VEC, LATENT_ROWS, LATENT_COLS,
        )  # fmt: skip

    if WAITS:
        finishes = pid == programs - 1
    else:
        finishes = arrive(barrier, programs)
    if finishes:
        elbo_finalize_kernel(
            s_partials, kl_partials, clamped_partials, log_sigma, beta, capacity,
            log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
            loss, distortion, rate, sigma, stats,
            batch, data_chunks, latent_chunks, log_sigma_stride, beta_stride,
            True, True, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA, HAS_CAPACITY, CAPACITY_TENSOR,
            False, SIGMA_PER_SAMPLE, ACC, ROWS, DATA_BLOCK, LATENT_BLOCK,
        )  # fmt: skip
        if g_log_sigma is not None or g_beta is not None:
            tl.debug_barrier()  # other threads read stats than have written them
            given_gradients(
                g_log_sigma, g_beta, grad_scale, None, None, stats, log_sigma, beta, capacity, None,
                grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value,
                batch_value, batch, 0, 0, 0, log_sigma_stride, beta_stride,
                HAS_GRAD_SCALE, False, False, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
                HAS_CAPACITY, CAPACITY_TENSOR, False, LOG_SIGMA_EACH, BETA_EACH, SAMPLES, ACC,
            )  # fmt: skip


class Plan(NamedTuple):
    """How a step is cut into programs."""

    data: Tiles
    latents: Tiles
    programs: int
    threads: int
    waits: bool

    @classmethod
    def of(cls, inputs: Inputs, knobs: Knobs, resident: int) -> Plan | None:
        """None where the stages must run one after another. `resident`: programs that are surely on the GPU at once.

        Where programs wait for one another, their tiles are the smallest with which `resident` programs hold the batch,
        so that it spreads over the whole GPU; the largest are of THREADS · HELD elements, two in a program.
        """
        if knobs.sigma_mode == ELEMENT.value or inputs.dtype == torch.float64 or not inputs.dims or not inputs.latents:
            return None
        batch, largest, per_image = inputs.batch, THREADS * HELD, knobs.sigma_mode == IMAGE.value
        whole = per_image and inputs.dims <= largest and not knobs.has_capacity()
        waits = knobs.sigma_mode == BATCH.value or knobs.has_capacity() or (per_image and not whole)
        tile = SMALLEST if waits else max(2 * SMALLEST, triton.next_power_of_2(inputs.dims) if whole else 0)
        data = inputs.tiles_of_data(Tiles.of_pieces, tile, whole)
        while waits and triton.cdiv(data.programs(batch), 2) > resident:
            tile *= 2
            if tile > largest:
                return None
            data = inputs.tiles_of_data(Tiles.of_pieces, tile, whole)
        threads = min(THREADS, tile // (8 if waits else 16))
        wide = 4 if inputs.prior_mu is not None else 16 // inputs.mu.element_size()
        latents = inputs.tiles_of_latents(Tiles.of, wide * threads)
        programs = triton.cdiv(data.programs(batch), 2 if waits else 1) + latents.programs(batch)
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
    inputs: Inputs, knobs: Knobs, plan: Plan, grad_scale: Tensor | None, grad_scale_value: float,
    outputs: Outputs, g_log_sigma: Tensor | None, g_beta: Tensor | None,
) -> Results:  # fmt: skip
    """Writes the outputs' buffers, and the gradients of a given log σ and of β, as `elbo_grads` does."""
    results, partials = Results.empty(inputs, knobs), Partials(inputs, plan.data, plan.latents, knobs.free_bits)
    d, k, stride, batch = plan.data, plan.latents, inputs.strides, inputs.batch
    sums = blocks(batch, d.chunks, k.chunks, BLOCK)
    totals = inputs.like.new_empty(2 * plan.programs if plan.waits else 0, dtype=inputs.dtype)
    with inputs.device_guard():
        elbo_step_kernel[(plan.programs,)](
            # inputs
            inputs.recon, inputs.target, inputs.mu, inputs.logvar, inputs.prior_mu, inputs.prior_logvar,
            knobs.free_bits, grad_scale, knobs.log_sigma, knobs.beta, knobs.capacity, grad_scale_value,
            *knobs.values(batch, inputs.dims, inputs.latents),
            # outputs
            *results,
            *(None if o is None else o.buffer for o in (*outputs[:2], *outputs[3:])), g_log_sigma, g_beta,
            # workspace
            partials.s, partials.kl, partials.clamped, totals, barrier_of(inputs.like.device),
            # shapes
            batch, k.programs(batch), stride_of(knobs.log_sigma), stride_of(knobs.beta),
            d.length, stride("recon", d), stride("target", d), d.chunks,
            k.length, stride("mu", k), stride("logvar", k), stride("prior_mu", k), stride("prior_logvar", k),
            k.chunks, k.per_chunk,
            # what there is
            WAITS=plan.waits, HAS_GRAD_SCALE=grad_scale is not None, **knobs.present(),
            SIGMA_PER_SAMPLE=knobs.sigma_per_sample(), LOG_SIGMA_EACH=each(knobs.log_sigma), BETA_EACH=each(knobs.beta),
            PRIOR=inputs.prior_mu is not None, FREE_BITS=knobs.free_bits > 0, ACC=inputs.triton_dtype, WIDE=inputs.wide,
            # tunables
            DATA_VEC=d.vec, DATA_ROWS=d.rows, DATA_COLS=d.cols,
            LATENT_VEC=k.vec, LATENT_ROWS=k.rows, LATENT_COLS=k.cols,
            ROWS=sums["ROWS"], DATA_BLOCK=sums["DATA_COLS"], LATENT_BLOCK=sums["LATENT_COLS"],
            SAMPLES=min(BLOCK, triton.next_power_of_2(batch)),
            PROGRAMS=max(plan.threads, triton.next_power_of_2(plan.programs)),  # each value is read by one thread
            **launch_options(plan), enable_fp_fusion=False,
        )  # fmt: skip
    return results
