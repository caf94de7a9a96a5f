"""Which tensors the kernels walk as they lie, what becomes of the others, and how a batch is cut into tiles.

A kernel walks each sample as one dense block, in memory order: any order of the dimensions inside a sample will do
(contiguous, channels_last, …), and any distance between samples (chunks of a packed tensor). Tensors that are walked
together share the order of the first one, the leader; one that differs is copied into it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a tile: with 8 warps 16 a thread, so four 128-bit loads of fp32 in flight for each tensor
WARPS = 8
PIECE = 4096  # elements of a sample in one row of a tile of pieces: 128-bit loads of fp32 by 1024 threads
MANY = 8192  # programs that fill any GPU; past that a program walks several tiles, which keeps the partials few


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


def empty_in_order(lead: Tensor, dtype: torch.dtype) -> Tensor:
    strides = (sample_size(lead), *lead.stride()[1:])
    return torch.empty_strided(lead.shape, strides, dtype=dtype, device=lead.device)


def in_order_of(t: Tensor, lead: Tensor) -> Tensor:
    return t if inner_strides(t) == inner_strides(lead) else empty_in_order(lead, t.dtype).copy_(t)


def batch_stride(t: Tensor) -> int:
    return 0 if t.shape[0] == 1 else t.stride(0)


class Output:
    """A result with empty_like's strides; written through a buffer where those are not the leader's order."""

    def __init__(self, like: Tensor, lead: Tensor, dtype: torch.dtype | None = None) -> None:
        self.result = torch.empty_like(like, dtype=dtype)
        dense = like.shape[0] == 1 or self.result.stride(0) == sample_size(like)
        direct = dense and inner_strides(self.result) == inner_strides(lead)
        self.buffer = self.result if direct else empty_in_order(lead, self.result.dtype)

    def finish(self) -> Tensor:
        return self.result if self.buffer is self.result else self.result.copy_(self.buffer)


@dataclass(frozen=True)
class Inside:
    """Where the log σ of an element lies, if it varies inside a sample: Σ over levels of
    element // divisor % size · stride, from the place where the sample's own begin.

    A level is a run of dimensions that can be walked as one and over which log σ is not repeated. No level: log σ lies
    as the data do. Two are enough for up to five dimensions (video); beyond, log σ may have to be copied.
    """

    levels: tuple[tuple[int, int, int], ...]  # (divisor, size, stride), innermost first

    @classmethod
    def of(cls, log_sigma: Tensor, lead: Tensor) -> Inside:
        """`log_sigma`: expanded to lead's shape, so that it has stride 0 where it is repeated."""
        levels: list[tuple[int, int, int]] = []
        dims = sorted((k for k in range(1, lead.dim()) if lead.shape[k] > 1), key=lead.stride)
        divisor = 1
        for k in dims:
            n = lead.shape[k]
            stride = log_sigma.stride(k)
            if levels and stride == levels[-1][1] * levels[-1][2] and divisor == levels[-1][0] * levels[-1][1]:
                levels[-1] = (levels[-1][0], levels[-1][1] * n, levels[-1][2])
            elif stride:
                levels.append((divisor, n, stride))
            divisor *= n
        if levels == [(1, divisor, 1)]:
            return AS_THE_DATA
        return cls(tuple(levels) or ((1, 1, 0),))

    def arguments(self) -> tuple[int, ...]:
        """Of two levels; one that is missing adds 0."""
        return tuple(n for level in (*self.levels, (1, 1, 0), (1, 1, 0))[:2] for n in level)


AS_THE_DATA = Inside(())


def unit(elements: int, strides: list[int]) -> int:
    return next(v for v in (16, 8, 4, 2, 1) if all(n % v == 0 for n in (elements, *strides)))


@dataclass(frozen=True)
class Tiles:
    """Samples cut into tiles of rows × cols elements: several short samples share a tile, a long one has many.

    Triton knows of an integer argument only whether 16 divides it. So lengths and strides are passed in units of `vec`
    elements, and multiplied back in the kernel: it then knows that rows start on multiples of vec, and keeps its loads
    128 bits wide for lengths that are multiples of 4 or 8 too.
    """

    length: int  # of a sample, in units of vec
    vec: int
    rows: int
    cols: int
    chunks: int  # partial sums of a sample
    per_chunk: int  # tiles of a chunk
    pieces: bool = False  # a row is a chunk, of any sample; or else a sample, in one of its chunks

    @classmethod
    def of(cls, elements: int, batch: int, strides: list[int], tile: int | None = None) -> Tiles:
        cols = min(tile or TILE, max(16, triton.next_power_of_2(elements)))
        rows = min((tile or TILE) // cols, triton.next_power_of_2(batch))
        tiles = triton.cdiv(elements, cols)
        per_chunk = min(tiles, triton.cdiv(tiles * triton.cdiv(batch, rows), MANY))
        vec = unit(elements, strides)
        return cls(elements // vec, vec, rows, cols, triton.cdiv(tiles, per_chunk), per_chunk)

    @classmethod
    def of_pieces(cls, elements: int, batch: int, strides: list[int], tile: int, whole: bool) -> Tiles:
        """Tiles whose rows are the pieces of all samples in turn, so that whatever the shape few of them stay empty; a
        program walks one tile. `whole`: a sample is one piece."""
        cols = max(16, triton.next_power_of_2(elements))
        cols = cols if whole else min(PIECE, tile, cols)
        chunks, vec = triton.cdiv(elements, cols), unit(elements, strides)
        rows = min(tile // cols, triton.next_power_of_2(batch * chunks))
        return cls(elements // vec, vec, rows, cols, chunks, 1, pieces=True)

    @classmethod
    def nothing(cls) -> Tiles:
        return cls(length=0, vec=1, rows=1, cols=16, chunks=1, per_chunk=0)

    def programs(self, batch: int) -> int:
        if self.pieces:
            return triton.cdiv(batch * self.chunks, self.rows)
        return triton.cdiv(batch, self.rows) * self.chunks


class Inputs:
    """The tensors of a call in an order in which they can be walked together, and the tiles that cover them."""

    def __init__(
        self,
        recon: Tensor | None, target: Tensor | None, mu: Tensor | None, logvar: Tensor | None,
        log_sigma: Tensor | None, prior_mu: Tensor | None, prior_logvar: Tensor | None,
    ) -> None:  # fmt: skip
        given = [t for t in (recon, target, mu, logvar) if t is not None]
        self.like, self.batch = given[0], given[0].shape[0]
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
        self.recon = self.target = self.log_sigma = self.mu = self.logvar = self.prior_mu = self.prior_logvar = None
        self.inside = AS_THE_DATA
        if recon is not None and target is not None:
            self.recon = leader(recon)
            self.target = in_order_of(target, self.recon)
            if log_sigma is not None:
                self.log_sigma = log_sigma.expand(recon.shape)
                self.inside = Inside.of(self.log_sigma, self.recon)
                if log_sigma.numel() == recon.numel() or len(self.inside.levels) > 2:
                    self.log_sigma = in_order_of(self.log_sigma, self.recon)
                    self.inside = AS_THE_DATA
        if mu is not None and logvar is not None:
            self.mu = leader(mu)
            self.logvar = in_order_of(logvar, self.mu)
            if prior_mu is not None and prior_logvar is not None:
                self.prior_mu, self.prior_logvar = in_order_of(prior_mu, self.mu), in_order_of(prior_logvar, self.mu)
        self.dims = 0 if self.recon is None else sample_size(self.recon)
        self.latents = 0 if self.mu is None else sample_size(self.mu)
        self.data_tiles = self.tiles_of_data(Tiles.of)
        self.latent_tiles = self.tiles_of_latents(Tiles.of)
        walked = (self.recon, self.target, self.log_sigma, self.mu, self.logvar, self.prior_mu, self.prior_logvar)
        ends = [self.batch * batch_stride(t) + sample_size(t) for t in walked if t is not None]
        dense = self.batch * max(self.dims, self.latents)  # gradients, also where the batch is expanded
        self.wide = max(dense, *ends) >= 2**31 or FORCE_WIDE
        self.num_warps = WARPS
        self.triton_dtype = tl.float64 if self.dtype == torch.float64 else tl.float32

    def tiles_of_data(self, cut: Callable[..., Tiles], *how: Any) -> Tiles | None:
        if self.dims == 0:
            return None
        walked = (self.recon, self.target, None if self.inside.levels else self.log_sigma)
        return cut(self.dims, self.batch, [batch_stride(t) for t in walked if t is not None], *how)

    def tiles_of_latents(self, cut: Callable[..., Tiles], *how: Any) -> Tiles | None:
        if self.latents == 0:
            return None
        walked = (self.mu, self.logvar, self.prior_mu, self.prior_logvar)
        return cut(self.latents, self.batch, [batch_stride(t) for t in walked if t is not None], *how)

    def strides(self, name: str, tiles: Tiles) -> int:
        t = getattr(self, name)
        return 0 if t is None else batch_stride(t) // tiles.vec

    def log_sigma_stride(self, tiles: Tiles) -> int:
        """Between samples; in units of vec only where log σ lies as the data do."""
        if self.log_sigma is None:
            return 0
        return batch_stride(self.log_sigma) // (1 if self.inside.levels else tiles.vec)

    def device_guard(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.like.device) if self.like.is_cuda else contextlib.nullcontext()


FORCE_WIDE = False  # tests set it: no test has memory for a tensor that needs 64-bit offsets
