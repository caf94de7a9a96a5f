"""Which tensors the kernels walk as they lie, what becomes of the others, and how a batch is cut into tiles. All of it
follows from shapes and strides: `_plan.py` works it out once for them, on tensors of the meta device.

A kernel walks each sample as one dense block, in memory order: any order of the dimensions inside a sample will do
(contiguous, channels_last, …), and any distance between samples (chunks of a packed tensor). Tensors that are walked
together share the order of the first one, the leader; one that differs is copied into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fused_elbo.call import Options, Tensors, compute_dtype, element_sigma, first

from . import structs
from .structs import PRESENT, Broadcast, Data, Latents, Run, constant, whole

TILE = 4096  # elements of a tile: with 8 warps 16 a thread, so four 128-bit loads of fp32 in flight for each tensor
WARPS = 8
CHUNK = 4096  # elements of a sample in one row of a tile of chunks: 128-bit loads of fp32 by 1024 threads
MANY = 8192  # programs that fill any GPU; past that a program walks several tiles, which keeps the partials few


def cdiv(n: int, size: int) -> int:
    """Returns what triton.cdiv does, which takes 4.5 µs on the host, as triton.next_power_of_2 does (`power_of_2`)."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """Returns the least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def sample_size(t: Tensor) -> int:
    return t.numel() // t.shape[0]


def inner_strides(t: Tensor) -> list[int]:
    return [s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True) if n > 1]


def samples_are_dense(t: Tensor) -> bool:
    expected = 1
    for stride, n in sorted((s, n) for n, s in zip(t.shape[1:], t.stride()[1:], strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= n
    return True


def leader(t: Tensor) -> Tensor:
    return t if samples_are_dense(t) else t.contiguous()


def empty_in_order(lead: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    strides = (sample_size(lead), *lead.stride()[1:])
    return torch.empty_strided(lead.shape, strides, dtype=dtype, device=device)


def in_order_of(t: Tensor, lead: Tensor) -> Tensor:
    return t if inner_strides(t) == inner_strides(lead) else empty_in_order(lead, t.dtype, t.device).copy_(t)


def batch_stride(t: Tensor) -> int:
    return 0 if t.shape[0] == 1 else t.stride(0)


def is_in_order(t: Tensor, lead: Tensor) -> bool:
    """Whether a result with empty_like's strides can be written as the kernels write: dense, in the leader's order."""
    result = torch.empty_like(t)
    dense = t.shape[0] == 1 or result.stride(0) == sample_size(t)
    return dense and inner_strides(result) == inner_strides(lead)


def ordered(tensors: Tensors, options: Options) -> Tensors:
    """Returns the tensors in an order in which they can be walked together; those that are already, as they are."""
    recon, target, mu, logvar = tensors.recon, tensors.target, tensors.mu, tensors.logvar
    if recon is not None and target is not None:
        recon = leader(recon)
        tensors = tensors._replace(recon=recon, target=in_order_of(target, recon))
        if (log_sigma := element_sigma(tensors, options)) is not None:
            tensors = tensors._replace(log_sigma=along(log_sigma, recon))
        if tensors.weight is not None:
            tensors = tensors._replace(weight=along(tensors.weight, recon))
    if mu is not None and logvar is not None:
        mu = leader(mu)
        priors = (None if p is None else in_order_of(p, mu) for p in (tensors.prior_mu, tensors.prior_logvar))
        prior_mu, prior_logvar = priors
        tensors = tensors._replace(mu=mu, logvar=in_order_of(logvar, mu), prior_mu=prior_mu, prior_logvar=prior_logvar)
    return tensors


def along(values: Tensor, lead: Tensor) -> Tensor:
    """Returns what is broadcast to the data in an order in which the kernels can read it."""
    expanded = values.expand(lead.shape)
    as_data = values.numel() == lead.numel() or len(runs_of(expanded, lead)) > 2
    return in_order_of(expanded, lead) if as_data else values


def runs_of(values: Tensor, lead: Tensor) -> list[Run]:
    """Returns the runs of dimensions over which log σ or a weight is not repeated, innermost first; none if it lies as
    the data do. `values`: expanded to lead's shape, so that they have stride 0 where they are repeated.

    Two are enough for up to five dimensions (video); beyond, they may have to be copied.
    """
    runs: list[Run] = []
    dims = sorted((k for k in range(1, lead.dim()) if lead.shape[k] > 1), key=lead.stride)
    divisor = 1
    for k in dims:
        n = lead.shape[k]
        stride = values.stride(k)
        if runs and stride == runs[-1].size * runs[-1].stride and divisor == runs[-1].divisor * runs[-1].size:
            runs[-1] = runs[-1]._replace(size=runs[-1].size * n)
        elif stride:
            runs.append(Run(divisor, n, stride))
        divisor *= n
    if runs == [(1, divisor, 1)]:
        return []
    return runs or [Run(1, 1, 0)]


def unit(walked: Sequence[Tensor]) -> int:
    """Returns how many elements divide the length of a sample and all distances between samples: not more than 128 bits
    hold of the narrowest dtype, since to know of more would be another kernel."""
    most = 16 // min(t.element_size() for t in walked)
    counts = [sample_size(walked[0]), *map(batch_stride, walked)]
    return next(v for v in (8, 4, 2, 1) if v <= most and all(n % v == 0 for n in counts))


@dataclass(frozen=True)
class Tiles:
    """Samples cut into tiles of rows × cols elements: several short samples share a tile, a long one has many.

    Lengths and strides are passed in units of `vec` elements, and multiplied back in the kernel: Triton then knows that
    rows start on multiples of vec, and keeps its loads 128 bits wide. Of the numbers themselves it knows nothing
    (`structs.whole`), so that one kernel serves them all.
    """

    length: int  # of a sample, in units of vec
    vec: int
    rows: int
    cols: int
    chunks: int  # partial sums of a sample
    per_chunk: int  # tiles of a chunk
    by_chunk: bool = False  # a row is a chunk, of any sample; or else a sample, in one of its chunks

    @classmethod
    def of(cls, elements: int, batch: int, vec: int, tile: int | None = None) -> Tiles:
        cols = min(tile or TILE, max(16, power_of_2(elements)))
        rows = min((tile or TILE) // cols, power_of_2(batch))
        tiles = cdiv(elements, cols)
        per_chunk = min(tiles, cdiv(tiles * cdiv(batch, rows), MANY))
        return cls(elements // vec, vec, rows, cols, cdiv(tiles, per_chunk), per_chunk)

    @classmethod
    def of_chunks(cls, elements: int, batch: int, vec: int, tile: int, whole: bool) -> Tiles:
        """Tiles whose rows are the chunks of all samples in turn, so that whatever the shape few of them stay empty; a
        program walks one tile. `whole`: a sample is one chunk."""
        cols = max(16, power_of_2(elements))
        cols = cols if whole else min(CHUNK, tile, cols)
        chunks = cdiv(elements, cols)
        rows = min(tile // cols, power_of_2(batch * chunks))
        return cls(elements // vec, vec, rows, cols, chunks, 1, by_chunk=True)

    def programs(self, batch: int) -> int:
        if self.by_chunk:
            return cdiv(batch * self.chunks, self.rows)
        return cdiv(batch, self.rows) * self.chunks

    def struct(self, batch: int) -> structs.Tiles:
        fixed = map(constant, (self.vec, self.rows, self.cols, self.by_chunk))
        programs = self.programs(batch) if self.length else 0
        return structs.Tiles(whole(self.length), whole(self.chunks), 2 * self.per_chunk - 1, whole(programs), *fixed)


NOTHING = Tiles(length=0, vec=1, rows=1, cols=16, chunks=1, per_chunk=1)


class Inputs:
    """The tensors of a call, or others of the same shapes and strides, that are walked together; and their tiles."""

    def __init__(self, tensors: Tensors, options: Options) -> None:
        """`tensors`: ordered."""
        self.recon, self.target, self.mu, self.logvar = tensors[:4]
        self.prior_mu, self.prior_logvar = tensors.prior_mu, tensors.prior_logvar
        self.dtype, self.batch = compute_dtype(*tensors[:4]), first(tensors).shape[0]
        self.log_sigma, self.runs = self._along(element_sigma(tensors, options))
        self.weight, self.weight_runs = self._along(tensors.weight)
        self.dims = 0 if self.recon is None else sample_size(self.recon)
        self.latent_dims = 0 if self.mu is None else sample_size(self.mu)
        walked = (
            self.recon, self.target, self.log_sigma, self.weight, self.mu, self.logvar, self.prior_mu, self.prior_logvar
        )  # fmt: skip
        ends = [self.batch * batch_stride(t) + sample_size(t) for t in walked if t is not None]
        dense = self.batch * max(self.dims, self.latent_dims)  # gradients, also where the batch is expanded
        self.wide = max(dense, *ends) >= 2**31 or FORCE_WIDE
        self.num_warps, self.free_bits = WARPS, options.free_bits > 0
        self.activation = constant(options.activation) if options.activation else None
        self.logvar_range = None if options.logvar_min is None else PRESENT
        self.is_plain = self.activation is None and self.weight is None  # data are differences, and nothing more

    def _along(self, values: Tensor | None) -> tuple[Tensor | None, list[Run]]:
        if self.recon is None or values is None:
            return None, []
        expanded = values.expand(self.recon.shape)
        return expanded, runs_of(expanded, self.recon)

    @cached_property
    def data_tiles(self) -> Tiles | None:
        return self.tiles_of_data(Tiles.of)

    @cached_property
    def latent_tiles(self) -> Tiles | None:
        return self.tiles_of_latents(Tiles.of)

    @property
    def segment(self) -> int:
        """How many neighbours in a tile surely share one log σ, a power of 2: they have one gradient together."""
        return math.gcd(self.runs[0].divisor, self.data_tiles.cols) if self.runs and self.data_tiles else 1

    @property
    def segments(self) -> Tensor:
        """A tensor with one element for each segment of recon, in its order. The dimensions inside the innermost run
        have become one."""
        assert self.recon is not None
        shape, stride, divisor = list(self.recon.shape), list(self.recon.stride()), self.runs[0].divisor
        inside = [k for k in range(1, len(shape)) if shape[k] > 1 and stride[k] < divisor]
        for k in inside:
            shape[k] = 1
        stride = [s // self.segment for s in stride]
        if inside:
            shape[inside[0]], stride[inside[0]] = divisor // self.segment, 1
        return torch.empty_strided(shape, stride, dtype=self.dtype, device="meta")

    def tiles_of_data(self, cut: Callable[..., Tiles], *how: Any) -> Tiles | None:
        if self.dims == 0:
            return None
        of_elements = None if self.runs else self.log_sigma, None if self.weight_runs else self.weight
        walked = (self.recon, self.target, *of_elements)
        return cut(self.dims, self.batch, unit([t for t in walked if t is not None]), *how)

    def tiles_of_latents(self, cut: Callable[..., Tiles], *how: Any) -> Tiles | None:
        if self.latent_dims == 0:
            return None
        walked = (self.mu, self.logvar, self.prior_mu, self.prior_logvar)
        return cut(self.latent_dims, self.batch, unit([t for t in walked if t is not None]), *how)

    def data(self, tiles: Tiles | None) -> Data:
        """Returns what a kernel is told of the data, for it to walk in these tiles."""
        if tiles is None or self.recon is None or self.target is None:
            # With weights, stats have a row of theirs whether or not data are walked.
            weight = NO_VALUES if self.weight is None else NO_VALUES._replace(stride=whole(0))
            return Data(None, None, None, None, NO_VALUES, weight, NOTHING.struct(self.batch))
        log_sigma = broadcast(self.log_sigma, self.runs, tiles)
        weight = broadcast(self.weight, self.weight_runs, tiles)
        of_bytes = PRESENT if self.target.dtype == torch.uint8 else None
        return Data(
            stride_of(self.recon, tiles), stride_of(self.target, tiles), of_bytes, self.activation, log_sigma, weight,
            tiles.struct(self.batch),
        )  # fmt: skip

    def latents(self, tiles: Tiles | None) -> Latents:
        if tiles is None or self.mu is None or self.logvar is None:
            return Latents(None, None, None, None, None, None, NOTHING.struct(self.batch))
        priors = (None if t is None else stride_of(t, tiles) for t in (self.prior_mu, self.prior_logvar))
        free_bits = PRESENT if self.free_bits else None
        return Latents(
            stride_of(self.mu, tiles), stride_of(self.logvar, tiles), *priors, free_bits, self.logvar_range,
            tiles.struct(self.batch),
        )  # fmt: skip


NO_VALUES = Broadcast(None, None, None)


def broadcast(values: Tensor | None, runs: list[Run], tiles: Tiles) -> Broadcast:
    if values is None:
        return NO_VALUES
    stride = batch_stride(values) // (1 if runs else tiles.vec)
    return Broadcast(whole(stride), *(*[Run(*map(whole, run)) for run in runs], None, None)[:2])


def stride_of(t: Tensor, tiles: Tiles) -> int:
    return whole(batch_stride(t) // tiles.vec)


FORCE_WIDE = False  # tests set it: no test has memory for a tensor that needs 64-bit offsets
