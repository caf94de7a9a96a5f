"""Stage two, O(B), one program each: partial sums to loss, distortion, rate and σ; and, for unequal weights of the
samples, what reaches every error through a σ that the batch shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._factors import ELEMENT, IMAGE, sigma_of, value_at
from ._math import HALF_LOG_2PI, exp, number, optimal_sigma

BLOCK = 4096  # partial sums taken at a time


@triton.jit
def row_sums(partials, rows, batch, chunks, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """Σ over the chunks of each row, in an order that only their number decides."""
    total = tl.zeros((ROWS, COLS), ACC)
    for first in range(0, chunks, COLS):
        cols = first + tl.arange(0, COLS)
        inside = (rows < batch)[:, None] & (cols < chunks)[None, :]
        total += tl.load(partials + rows[:, None] * chunks + cols[None, :], inside, 0.0)
    return tl.sum(total, 1)


@triton.jit
def elbo_finalize_kernel(
    # inputs
    s_partials, kl_partials, clamped_partials, log_sigma, beta, capacity,
    log_sigma_value: tl.float64, min_log_sigma: tl.float64, beta_value: tl.float64, capacity_value: tl.float64,
    scale: tl.float64, dims: tl.float64, batch_size: tl.float64,
    # outputs
    loss, distortion, rate, sigma, stats,
    # shapes
    batch, data_chunks, latent_chunks, log_sigma_stride, beta_stride,
    # what there is
    HAS_DATA: tl.constexpr, HAS_LATENTS: tl.constexpr, MODE: tl.constexpr, SOFTCLIP: tl.constexpr,
    HAS_LOG_SIGMA: tl.constexpr, HAS_BETA: tl.constexpr, HAS_CAPACITY: tl.constexpr, CAPACITY_TENSOR: tl.constexpr,
    PER_SAMPLE: tl.constexpr, SIGMA_PER_SAMPLE: tl.constexpr, ACC: tl.constexpr,
    # tunables
    ROWS: tl.constexpr, DATA_COLS: tl.constexpr, LATENT_COLS: tl.constexpr,
):  # fmt: skip
    d, n, floor = number(dims, ACC), number(batch_size, ACC), number(min_log_sigma, ACC)
    s_total, kl_total, clamped_total = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    for first in range(0, batch, ROWS):
        rows = first + tl.arange(0, ROWS)
        s, kl, clamped = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
        if HAS_DATA:
            s = row_sums(s_partials, rows, batch, data_chunks, ROWS, DATA_COLS, ACC)
        if HAS_LATENTS:
            kl = row_sums(kl_partials, rows, batch, latent_chunks, ROWS, LATENT_COLS, ACC)
            clamped = row_sums(clamped_partials, rows, batch, latent_chunks, ROWS, LATENT_COLS, ACC)
        tl.store(stats + rows, s, rows < batch)
        tl.store(stats + (batch + 1) + rows, kl, rows < batch)
        tl.store(stats + 2 * (batch + 1) + rows, clamped, rows < batch)
        s_total += s
        kl_total += kl
        clamped_total += clamped

    total = tl.sum(s_total, 0)
    tl.store(stats + batch, total)
    tl.store(stats + (batch + 1) + batch, tl.sum(kl_total, 0))
    tl.store(stats + 2 * (batch + 1) + batch, tl.sum(clamped_total, 0))
    distortions, weighted = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    # The sums again, rather than the stats: no thread then reads what another one wrote.
    for first2 in range(0, batch, ROWS):
        rows2 = first2 + tl.arange(0, ROWS)
        inside = rows2 < batch
        nats, b = tl.zeros((ROWS,), ACC), value_at(beta, rows2, beta_stride, inside, beta_value, HAS_BETA, ROWS, ACC)
        if HAS_DATA:
            s2 = row_sums(s_partials, rows2, batch, data_chunks, ROWS, DATA_COLS, ACC)
            if MODE == ELEMENT:
                nats = 0.5 * s2 + d * HALF_LOG_2PI
            else:
                given = value_at(log_sigma, rows2, log_sigma_stride, inside, log_sigma_value, HAS_LOG_SIGMA, ROWS, ACC)
                ls, inverse, _ = sigma_of(s2, given, total, n, d, floor, MODE, SOFTCLIP, ROWS, ACC)
                nats = 0.5 * s2 * inverse + d * (ls + HALF_LOG_2PI)
                if SIGMA_PER_SAMPLE:
                    tl.store(sigma + rows2, exp(ls), inside)
                else:
                    tl.store(sigma + rows2, exp(ls), rows2 < 1)
        elif MODE != ELEMENT:
            own = value_at(log_sigma, rows2, log_sigma_stride, inside, log_sigma_value, HAS_LOG_SIGMA, ROWS, ACC)
            tl.store(sigma + rows2, exp(own), rows2 < 1)
        clamped2, kl2 = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
        if HAS_LATENTS:
            kl2 = row_sums(kl_partials, rows2, batch, latent_chunks, ROWS, LATENT_COLS, ACC)
            clamped2 = row_sums(clamped_partials, rows2, batch, latent_chunks, ROWS, LATENT_COLS, ACC)
        if PER_SAMPLE:
            tl.store(loss + rows2, nats + b * clamped2, inside)
            tl.store(distortion + rows2, nats, inside)
            tl.store(rate + rows2, kl2, inside)
        distortions += tl.where(inside, nats, 0.0)
        weighted += tl.where(inside, b * clamped2, 0.0)

    if not PER_SAMPLE:
        r = number(scale, ACC)
        nats_all = r * tl.sum(distortions, 0)
        penalty = r * tl.sum(weighted, 0)
        if HAS_CAPACITY:
            if CAPACITY_TENSOR:
                target = tl.load(capacity).to(ACC)
            else:
                target = number(capacity_value, ACC)
            if HAS_BETA:
                one_beta = tl.load(beta).to(ACC)
            else:
                one_beta = number(beta_value, ACC)
            penalty = r * n * one_beta * tl.abs(tl.sum(clamped_total, 0) / n - target)
        tl.store(loss, nats_all + penalty)
        tl.store(distortion, nats_all)
        tl.store(rate, r * tl.sum(kl_total, 0))


@triton.jit
def elbo_weights_kernel(
    # inputs
    grad_loss, grad_distortion, stats,
    min_log_sigma: tl.float64, scale: tl.float64, dims: tl.float64, batch_size: tl.float64,
    # output: one number
    through,
    # shapes
    batch, grad_loss_stride, grad_distortion_stride,
    # what there is
    HAS_GRAD_LOSS: tl.constexpr, HAS_GRAD_DISTORTION: tl.constexpr, SOFTCLIP: tl.constexpr, ACC: tl.constexpr,
    # tunables
    ROWS: tl.constexpr,
):  # fmt: skip
    """slope · Σ_j w_j (D − S_j/σ²) / ΣS for a σ shared by the batch and unequal w_j."""
    d, n, floor, r = number(dims, ACC), number(batch_size, ACC), number(min_log_sigma, ACC), number(scale, ACC)
    total = tl.load(stats + batch)
    _, inverse, slope = optimal_sigma(total, n * d, floor, SOFTCLIP)
    flows = tl.zeros((ROWS,), ACC)
    for first in range(0, batch, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < batch
        w = value_at(grad_loss, rows, grad_loss_stride, inside, 0.0, HAS_GRAD_LOSS, ROWS, ACC)
        w += value_at(grad_distortion, rows, grad_distortion_stride, inside, 0.0, HAS_GRAD_DISTORTION, ROWS, ACC)
        flows += r * w * (d - tl.load(stats + rows, inside, 0.0) * inverse)
    tl.store(through, slope * tl.sum(flows, 0) / tl.where(total == 0.0, 1.0, total))


class Knobs(NamedTuple):
    """The arguments of the O(B) arithmetic, as `ops.forward` has them."""

    log_sigma: Tensor | None  # None where σ varies inside a sample
    beta: Tensor | None
    capacity: Tensor | None
    sigma_mode: int
    softclip: bool
    log_sigma_value: float
    min_log_sigma: float
    free_bits: float
    beta_value: float
    capacity_value: float | None
    reduction: int

    def scale(self, batch: int, dims: int) -> float:
        return (1 / batch, 1.0, 1 / (batch * dims), 1.0)[self.reduction]

    def values(self, batch: int, dims: int, latents: int) -> tuple[float, ...]:
        capacity = 0.0 if self.capacity_value is None else self.capacity_value
        scale = self.scale(batch, dims or latents)
        return (self.log_sigma_value, self.min_log_sigma, self.beta_value, capacity, scale, float(dims), float(batch))

    def sigma_per_sample(self) -> bool:
        return self.sigma_mode == IMAGE.value or each(self.log_sigma)

    def has_capacity(self) -> bool:
        return self.capacity is not None or self.capacity_value is not None

    def present(self) -> dict[str, Any]:
        return {
            "MODE": self.sigma_mode, "SOFTCLIP": self.softclip,
            "HAS_LOG_SIGMA": self.log_sigma is not None, "HAS_BETA": self.beta is not None,
            "HAS_CAPACITY": self.has_capacity(), "CAPACITY_TENSOR": self.capacity is not None,
        }  # fmt: skip


def each(t: Tensor | None) -> bool:
    return t is not None and t.dim() == 1


def stride_of(t: Tensor | None) -> int:
    """Of a tensor with one value per sample, or one for all."""
    return 0 if t is None or t.dim() == 0 else t.stride(0)


class Results(NamedTuple):
    loss: Tensor
    distortion: Tensor
    rate: Tensor
    sigma: Tensor
    stats: Tensor

    @classmethod
    def empty(cls, inputs, knobs: Knobs) -> Results:
        batch = inputs.batch
        reduced = (batch,) if knobs.reduction == 3 else ()
        no_sigma = knobs.sigma_mode == ELEMENT.value
        sigma = (0,) if no_sigma else (batch,) if knobs.sigma_per_sample() else ()
        shapes: list[tuple[int, ...]] = [reduced, reduced, reduced, sigma, (3, batch + 1)]
        return cls(*(inputs.like.new_empty(shape, dtype=inputs.dtype) for shape in shapes))


def blocks(batch: int, data_chunks: int, latent_chunks: int, most: int) -> dict[str, int]:
    """How many samples and partial sums of them are taken at a time."""
    data_cols, latent_cols = (min(most, triton.next_power_of_2(chunks)) for chunks in (data_chunks, latent_chunks))
    rows = max(1, min(most // max(data_cols, latent_cols), triton.next_power_of_2(batch)))
    return {"ROWS": rows, "DATA_COLS": data_cols, "LATENT_COLS": latent_cols}


def elbo_finalize(inputs, partials, knobs: Knobs) -> Results:
    batch, results = inputs.batch, Results.empty(inputs, knobs)
    data_chunks, latent_chunks = (1 if p is None else p.shape[1] for p in (partials.s, partials.kl))
    with inputs.device_guard():
        elbo_finalize_kernel[(1,)](
            # inputs
            partials.s, partials.kl, partials.clamped, knobs.log_sigma, knobs.beta, knobs.capacity,
            *knobs.values(batch, inputs.dims, inputs.latents),
            # outputs
            *results,
            # shapes
            batch, data_chunks, latent_chunks, stride_of(knobs.log_sigma), stride_of(knobs.beta),
            # what there is
            HAS_DATA=partials.s is not None, HAS_LATENTS=partials.kl is not None, **knobs.present(),
            PER_SAMPLE=knobs.reduction == 3, SIGMA_PER_SAMPLE=knobs.sigma_per_sample(), ACC=inputs.triton_dtype,
            # tunables
            **blocks(batch, data_chunks, latent_chunks, BLOCK),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return results


def unequal(grad_output: Tensor | None) -> bool:
    """A grad_output with a value per sample, unless its stride says that all are one."""
    return grad_output is not None and grad_output.dim() == 1 and grad_output.stride(0) != 0


def elbo_weights(
    inputs, stats: Tensor, knobs: Knobs, grad_loss: Tensor | None, grad_distortion: Tensor | None
) -> Tensor:
    """() tensor; needed only where σ is shared by the batch and a grad_output is `unequal`."""
    through = stats.new_empty(())
    with inputs.device_guard():
        elbo_weights_kernel[(1,)](
            # inputs
            grad_loss, grad_distortion, stats,
            knobs.min_log_sigma, knobs.scale(inputs.batch, inputs.dims), float(inputs.dims), float(inputs.batch),
            # output
            through,
            # shapes
            inputs.batch, stride_of(grad_loss), stride_of(grad_distortion),
            # what there is
            HAS_GRAD_LOSS=grad_loss is not None, HAS_GRAD_DISTORTION=grad_distortion is not None,
            SOFTCLIP=knobs.softclip, ACC=inputs.triton_dtype,
            # tunables
            ROWS=min(BLOCK, triton.next_power_of_2(inputs.batch)),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return through
