"""All stages in one launch: recon and target are read once, and their differences kept in registers until they are
multiplied into gradients. 3N + 6L bytes for N of recon and L of mu, where the stages one after another move 5N + 6L.

What the factor of a gradient needs decides how (`Plan`):

- A σ that is given, or that of an image which one program holds: the program knows the factor, and writes at once.
- A σ of the batch, or of an image that several programs share; or a capacity: the factor needs what all programs have
  summed, so they wait for one another at a grid barrier. All must be on the GPU at once (a cooperative launch), each
  with its differences, so there is a largest batch.

In both, the last program to arrive does what is O(B): the loss, and the gradients of a given log σ and of β.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout
from ._factors import BATCH, ELEMENT, IMAGE, factors, sample_factors
from ._layout import Inputs, Tiles
from .elbo_finalize import BLOCK, Knobs, Results, blocks, each, elbo_finalize_kernel, stride_of
from .elbo_grads import Outputs, given_gradients, latent_gradients
from .elbo_stats import Partials, columns, latent_sums, row_offsets

THREADS = 1024  # of a program at most: its registers are then limited to 64 a thread, and one always fits on an SM
HELD = 32  # differences in the registers of a thread at most; a 33rd to 64th would be spilled


@triton.jit
def step_factors(
    rows, batch, s, stats, grad_scale, log_sigma, beta, capacity,
    grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
    log_sigma_stride, beta_stride,
    WAITS: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr, MODE: tl.constexpr, SOFTCLIP: tl.constexpr,
    HAS_LOG_SIGMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_CAPACITY: tl.constexpr, CAPACITY_TENSOR: tl.constexpr,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(a_i, b_i) of samples: from stats, once they are there; before, with no more than the sample's own s, if that."""
    if WAITS:
        a, b, _, _, _ = sample_factors(
            rows, rows < batch, grad_scale, None, None, stats, log_sigma, beta, capacity, None,
            grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
            batch, 0, 0, 0, log_sigma_stride, beta_stride,
            HAS_GRAD_SCALE, False, False, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
            HAS_CAPACITY, CAPACITY_TENSOR, False, ROWS, ACC,
        )  # fmt: skip
    else:
        unknown = tl.zeros((ROWS,), ACC)
        a, b, _, _, _ = factors(
            rows, rows < batch, s, unknown, unknown, unknown, grad_scale, None, None, log_sigma, beta, capacity, None,
            grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
            0, 0, 0, log_sigma_stride, beta_stride,
            HAS_GRAD_SCALE, False, False, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
            HAS_CAPACITY, CAPACITY_TENSOR, False, ROWS, ACC,
        )  # fmt: skip
    return a, b


@triton.jit
def arrive(barrier, programs):
    """(the generation of the barrier, whether all others have arrived before). barrier[0] counts the programs that have;
    the last one sets it back to 0, for the next launch. barrier[1] is a generation, which `release` ends.

    The barrier of the program comes first, for one thread alone speaks to the others, for all that its program wrote.
    """
    tl.debug_barrier()
    generation = tl.atomic_add(barrier + 1, 0, sem="relaxed")
    is_last = tl.atomic_add(barrier, 1, sem="acq_rel") == programs - 1
    if is_last:
        tl.atomic_xchg(barrier, 0, sem="relaxed")
    return generation, is_last


@triton.jit
def release(barrier):
    tl.debug_barrier()
    tl.atomic_add(barrier + 1, 1, sem="release")


@triton.jit
def wait(barrier, generation):
    now = generation
    while now == generation:
        now = tl.atomic_add(barrier + 1, 0, sem="acquire")


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
    s_partials, kl_partials, clamped_partials, barrier,
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
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    # The latents from the last program on: those past the data have nothing else to do.
    for lpid in range(programs - 1 - pid, latent_programs, programs):
        latent_sums(
            lpid, mu, logvar, prior_mu, prior_logvar, free_bits, kl_partials, clamped_partials,
            batch, latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
            PRIOR, FREE_BITS, ACC, WIDE, LATENT_VEC, LATENT_ROWS, LATENT_COLS,
        )  # fmt: skip

    # In a program past the data no row is inside the batch.
    first, chunk = pid // data_chunks * DATA_ROWS, pid % data_chunks
    rows, cols = first + tl.arange(0, DATA_ROWS), columns(chunk, DATA_COLS, WIDE)
    inside = (rows < batch)[:, None] & (cols < dims * DATA_VEC)
    r_at = row_offsets(first, recon_stride * DATA_VEC, DATA_ROWS, WIDE) + cols
    t_at = row_offsets(first, target_stride * DATA_VEC, DATA_ROWS, WIDE) + cols
    e = tl.load(recon + r_at, inside, 0.0).to(ACC) - tl.load(target + t_at, inside, 0.0).to(ACC)
    s = tl.sum(e * e, 1)
    tl.store(s_partials + rows * data_chunks + chunk, s, rows < batch)

    # Gradients wait for all sums, or for nothing.
    for part in tl.static_range(2):
        if WAITS == (part == 0):
            generation, is_last = arrive(barrier, programs)
            if is_last:
                elbo_finalize_kernel(
                    s_partials, kl_partials, clamped_partials, log_sigma, beta, capacity,
                    log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value, batch_value,
                    loss, distortion, rate, sigma, stats,
                    batch, data_chunks, latent_chunks, log_sigma_stride, beta_stride,
                    True, True, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA, HAS_CAPACITY, CAPACITY_TENSOR,
                    False, SIGMA_PER_SAMPLE, ACC, ROWS, DATA_BLOCK, LATENT_BLOCK,
                )  # fmt: skip
                tl.debug_barrier()  # stats are read by other threads than wrote them
                if g_log_sigma is not None or g_beta is not None:
                    given_gradients(
                        g_log_sigma, g_beta, grad_scale, None, None, stats, log_sigma, beta, capacity, None,
                        grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value,
                        batch_value, batch, 0, 0, 0, log_sigma_stride, beta_stride,
                        HAS_GRAD_SCALE, False, False, MODE, SOFTCLIP, HAS_LOG_SIGMA, HAS_BETA,
                        HAS_CAPACITY, CAPACITY_TENSOR, False, LOG_SIGMA_EACH, BETA_EACH, SAMPLES, ACC,
                    )  # fmt: skip
                if WAITS:
                    release(barrier)
            elif WAITS:
                wait(barrier, generation)
        else:
            a, _ = step_factors(
                rows, batch, s, stats, grad_scale, log_sigma, beta, capacity,
                grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value,
                batch_value, log_sigma_stride, beta_stride, WAITS, HAS_GRAD_SCALE, MODE, SOFTCLIP,
                HAS_LOG_SIGMA, HAS_BETA, HAS_CAPACITY, CAPACITY_TENSOR, DATA_ROWS, ACC,
            )  # fmt: skip
            g, g_at = a[:, None] * e, row_offsets(first, dims * DATA_VEC, DATA_ROWS, WIDE) + cols
            if g_recon is not None:
                tl.store(g_recon + g_at, g.to(g_recon.dtype.element_ty), inside)
            if g_target is not None:
                tl.store(g_target + g_at, (-g).to(g_target.dtype.element_ty), inside)
            for lpid in range(programs - 1 - pid, latent_programs, programs):
                lrows = lpid // latent_chunks * LATENT_ROWS + tl.arange(0, LATENT_ROWS)
                _, b = step_factors(
                    lrows, batch, tl.zeros((LATENT_ROWS,), ACC), stats, grad_scale, log_sigma, beta, capacity,
                    grad_scale_value, log_sigma_value, min_log_sigma, beta_value, capacity_value, scale, dims_value,
                    batch_value, log_sigma_stride, beta_stride, WAITS, HAS_GRAD_SCALE, MODE, SOFTCLIP,
                    HAS_LOG_SIGMA, HAS_BETA, HAS_CAPACITY, CAPACITY_TENSOR, LATENT_ROWS, ACC,
                )  # fmt: skip
                latent_gradients(
                    lpid, b, b * 0.0, mu, logvar, prior_mu, prior_logvar, free_bits,
                    g_mu, g_logvar, g_prior_mu, g_prior_logvar, batch,
                    latents, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, latent_chunks, latent_tiles,
                    PRIOR, FREE_BITS, ACC, WIDE, LATENT_VEC, LATENT_ROWS, LATENT_COLS,
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

        A program holds up to THREADS · HELD differences, in fp32. Of a step whose programs wait for one another, the
        tiles are the smallest that `resident` programs can hold, so that it spreads over the whole GPU.
        """
        if knobs.sigma_mode == ELEMENT.value or inputs.dtype == torch.float64 or not inputs.dims or not inputs.latents:
            return None
        most = HELD * THREADS
        alone = knobs.sigma_mode == IMAGE.value and inputs.dims <= most  # each image in one program
        waits = (
            knobs.has_capacity() or knobs.sigma_mode == BATCH.value or (knobs.sigma_mode == IMAGE.value and not alone)
        )
        tile = _layout.TILE
        while True:
            data = inputs.tiles_of_data(Tiles.held, tile, alone)
            if (data.chunks == 1 or not alone) and (data.programs(inputs.batch) <= resident or not waits):
                break
            if tile >= most:
                return None
            tile *= 2
        threads = min(THREADS, tile // 16)
        latents = inputs.tiles_of_latents(Tiles.of, 8 * threads)
        programs = data.programs(inputs.batch) + latents.programs(inputs.batch)
        return cls(data, latents, min(programs, resident) if waits else programs, threads, waits)


def resident_programs(device: torch.device) -> int:
    """One on each SM: 1024 threads of at most 64 registers are what an SM of any NVIDIA GPU since sm_70 holds of both.
    In Triton's interpreter programs run one after another, and none may wait for another."""
    if triton.knobs.runtime.interpret:
        return 1
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    return properties["multiprocessor_count"]


def warp_size() -> int:
    return 32 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().warp_size


_barriers: dict[tuple[torch.device, int], Tensor] = {}


def barrier_of(device: torch.device) -> Tensor:
    """Two numbers for the programs of a launch; see `arrive`. Launches that may run at the same time need their own, so
    each stream has one; and each graph, as it may be replayed on any stream (one small launch more, that sets it to 0).
    """
    if device.type != "cuda":
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    if (device, stream) not in _barriers:
        _barriers[device, stream] = torch.zeros(2, dtype=torch.int32, device=device)
    return _barriers[device, stream]


def elbo_step(
    inputs: Inputs, knobs: Knobs, plan: Plan, grad_scale: Tensor | None, grad_scale_value: float,
    outputs: Outputs, g_log_sigma: Tensor | None, g_beta: Tensor | None,
) -> Results:  # fmt: skip
    """Writes the outputs' buffers, and the gradients of a given log σ and of β, as `elbo_grads` does."""
    results, partials = Results.empty(inputs, knobs), Partials(inputs, plan.data, plan.latents, knobs.free_bits)
    d, k, stride, batch = plan.data, plan.latents, inputs.strides, inputs.batch
    block = min(BLOCK, plan.threads)  # one value a thread: the registers hold differences
    sums = blocks(batch, d.chunks, k.chunks, block)
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
            partials.s, partials.kl, partials.clamped, barrier_of(inputs.like.device),
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
            SAMPLES=min(block, triton.next_power_of_2(batch)),
            num_warps=plan.threads // warp_size(), enable_fp_fusion=False, launch_cooperative_grid=plan.waits,
        )  # fmt: skip
    return results
