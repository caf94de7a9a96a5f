"""The rates of a hierarchy's levels, and their gradients: as many levels in one launch as MOST, since most are small.

A program finds its level by its id, and then does what elbo_stats and elbo_grads do with latents. The last program of
each level adds up what the level's programs have found, and the last of these adds up the levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import _layout
from ._elements import rows_and_chunk, size
from ._grid import COUNTERS, arrive
from ._layout import WARPS, Inputs, batch_stride, cdiv, power_of_2, unit
from ._math import whole
from ._plan import AnyLaunch, at_most
from .elbo_finalize import row_sums
from .elbo_grads import latent_gradients
from .elbo_stats import chunk_rates
from .structs import Latents, Number, constant
from .structs import whole as as_whole

MOST = tl.constexpr(16)  # levels of a launch, a power of 2: a program chooses its pointers among those of all
# A tile has the same rows and columns whatever a level's size, so that one kernel serves all; short levels leave much
# of it empty. Of TILE elements, not half as many, a thread would have 157 registers, and 175 for gradients.
ROWS = 4
SUMS = 2048  # partial sums taken at a time


class Pointers(NamedTuple):
    """The latents of a level, or their gradients. Where there is no prior, or a gradient is not wanted, any tensor of
    the dtype that there would be: a structure that a function returns may hold no None."""

    mu: Tensor
    logvar: Tensor
    prior_mu: Tensor
    prior_logvar: Tensor


class Cut(NamedTuple):
    """A level in its hierarchy and in a launch; all as `structs.whole` makes them. Strides: between samples, in units
    of VEC elements, as the length of a sample is."""

    index: int  # in the hierarchy
    place: int  # in the launch
    first: int  # of its programs
    programs: int
    partials: int  # where its partial sums begin
    mu_stride: int
    logvar_stride: int
    prior_mu_stride: int
    prior_logvar_stride: int
    length: int
    chunks: int
    per_chunk: int  # tiles of a chunk


class Level(NamedTuple):
    tensors: Pointers
    cut: Cut


class GradsLevel(NamedTuple):
    tensors: Pointers
    gradients: Pointers
    cut: Cut


class Batch(NamedTuple):
    """What all levels have in common."""

    size: int
    levels: int  # of the hierarchy
    ACC: tl.constexpr
    WIDE: tl.constexpr
    FREE_BITS: tl.constexpr | None


class How(NamedTuple):
    """What a launch is compiled for."""

    LEVELS: tl.constexpr  # of the launch, a power of 2: the last ones may have no programs
    PRIOR: tl.constexpr
    VEC: tl.constexpr
    ROWS: tl.constexpr
    COLS: tl.constexpr
    MU: tl.constexpr  # whether its gradient is wanted, and so on
    LOGVAR: tl.constexpr
    PRIOR_MU: tl.constexpr
    PRIOR_LOGVAR: tl.constexpr


class Numbers(NamedTuple):
    free_bits: Number


class LevelsCall(NamedTuple):
    """What is said of all levels of a launch."""

    numbers: Numbers
    batch: Batch
    how: How


class Work(NamedTuple):
    """What is made of a chunk: its sums, in `partials`; or, where `grad` is that of the rates, gradients."""

    partials: Tensor | None
    grad: Tensor | None
    sample_stride: int | None
    level_stride: int | None


class Sums(NamedTuple):
    """What becomes of partial sums: the rates of each level, [batch, levels], and of all, [batch], where wanted."""

    rates: Tensor
    total: Tensor | None
    ROWS: tl.constexpr  # samples at a time
    CHUNKS: tl.constexpr  # partial sums of a sample at a time
    LEVELS: tl.constexpr  # a power of 2 that is no less than those of the hierarchy
    OF_TOTAL: tl.constexpr  # samples at a time in the sums over the levels


class LevelCall(NamedTuple):
    """`structs.Call`, of one level."""

    tensors: Any
    numbers: Any
    latents: Any
    batch: Any


class LevelTiles(NamedTuple):
    """`structs.Tiles`, of one level."""

    length: Any
    chunks: Any
    per_chunk: Any
    VEC: Any
    ROWS: Any
    COLS: Any
    BY_CHUNK: Any


@triton.jit
def level_of(levels, pid, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Returns the level that the pid-th program is of, among COUNT from FIRST on."""
    HALF: tl.constexpr = COUNT // 2
    if COUNT == 1:
        level = levels[FIRST]
    elif pid < whole(levels[FIRST + HALF].cut.first):
        level = level_of(levels, pid, FIRST, HALF)
    else:
        level = level_of(levels, pid, FIRST + HALF, HALF)
    return level


@triton.jit
def on_level(pid, level, call, work):
    """Passes the call of one level on, since a structure that is returned loses its constants."""
    cut = level.cut
    on_chunk(
        pid - whole(cut.first),
        LevelCall(
            level.tensors,
            call.numbers,
            Latents(
                cut.mu_stride,
                cut.logvar_stride,
                cut.prior_mu_stride if call.how.PRIOR else None,
                cut.prior_logvar_stride if call.how.PRIOR else None,
                call.batch.FREE_BITS,
                None,
                LevelTiles(
                    cut.length, cut.chunks, cut.per_chunk - 4, call.how.VEC, call.how.ROWS, call.how.COLS, False
                ),
            ),
            call.batch,
        ),
        level, call.how, work,
    )  # fmt: skip


@triton.jit
def on_chunk(lpid, call, level, how, work):
    """Writes the sums, or the gradients, of the lpid-th chunk of a level."""
    lrows, lchunk = rows_and_chunk(lpid, call.latents.tiles)
    if work.grad is None:
        _, clamped = chunk_rates(lrows, lchunk, call)
        own = whole(level.cut.partials) + lrows * whole(level.cut.chunks) + lchunk
        tl.store(work.partials + own, clamped, lrows < size(call))
    else:
        own = lrows * whole(work.sample_stride) + whole(level.cut.index) * whole(work.level_stride)
        grad = tl.load(work.grad + own, lrows < size(call), 0.0).to(call.batch.ACC)
        latent_gradients(
            lpid, grad, tl.zeros((how.ROWS,), call.batch.ACC), call,
            Pointers(
                level.gradients.mu if how.MU else None,
                level.gradients.logvar if how.LOGVAR else None,
                level.gradients.prior_mu if how.PRIOR_MU else None,
                level.gradients.prior_logvar if how.PRIOR_LOGVAR else None,
            ),
        )  # fmt: skip


@triton.jit
def level_sums(level, partials, sums, call):
    """Writes the rates of a level."""
    for first in range(0, size(call), sums.ROWS):
        rows = first + tl.arange(0, sums.ROWS)
        found = row_sums(partials + whole(level.cut.partials), rows, call, level.cut, sums.ROWS, sums.CHUNKS)
        at = rows * whole(call.batch.levels) + whole(level.cut.index)
        tl.store(sums.rates + at, found, rows < size(call))


@triton.jit
def total_sums(sums, call):
    """Writes the sums over the levels."""
    for first in range(0, size(call), sums.OF_TOTAL):
        rows = first + tl.arange(0, sums.OF_TOTAL)
        levels = tl.arange(0, sums.LEVELS)
        inside = (rows < size(call))[:, None] & (levels < whole(call.batch.levels))[None, :]
        rates = tl.load(sums.rates + rows[:, None] * whole(call.batch.levels) + levels[None, :], inside, 0.0)
        tl.store(sums.total + rows, tl.sum(rates, 1), rows < size(call))


@triton.jit
def elbo_levels_kernel(
    # inputs, and shapes
    levels, call,
    # workspace
    work, barrier,
    # outputs
    sums,
):  # fmt: skip
    pid = tl.program_id(0)
    level = level_of(levels, pid, 0, call.how.LEVELS)
    on_level(pid, level, call, work)
    if arrive(barrier + COUNTERS + whole(level.cut.place), whole(level.cut.programs)):
        level_sums(level, work.partials, sums, call)
        # All launches of a hierarchy count its levels on.
        if sums.total is not None and arrive(barrier + COUNTERS + MOST, whole(call.batch.levels)):
            total_sums(sums, call)


@triton.jit
def elbo_levels_grads_kernel(
    # inputs, and shapes
    levels, call,
    # what comes in
    work,
):  # fmt: skip
    pid = tl.program_id(0)
    on_level(pid, level_of(levels, pid, 0, call.how.LEVELS), call, work)


class Member(NamedTuple):
    """A level of a launch, with its place in the hierarchy."""

    index: int
    inputs: Inputs


class LevelsLaunch:
    """A launch for levels of the same dtypes and units. `wanted`: which gradients; None for the rates, whose partial
    sums begin at the `partials`-th."""

    def __init__(self, members: Sequence[Member], batch: Batch, wanted: Pointers | None, partials: int = 0) -> None:
        size, alike = members[0].inputs.batch, walked(members[0].inputs)
        rows = min(ROWS, power_of_2(size))
        cols, vec = _layout.TILE // 2 // rows, unit(alike)
        cuts, programs = [], 0
        for place, (index, inputs) in enumerate(members):
            tiles = cdiv(inputs.latent_dims, cols)
            per_chunk = min(tiles, cdiv(tiles * cdiv(size, rows), _layout.MANY))
            chunks = cdiv(tiles, per_chunk)
            own = cdiv(size, rows) * chunks
            strides = [batch_stride(t) // vec for t in pointers_of(walked(inputs))]
            cut = (index, place, programs, own, partials, *strides, inputs.latent_dims // vec, chunks, per_chunk)
            cuts.append(Cut._make(map(as_whole, cut)))
            programs, partials = programs + own, partials + size * chunks
        self.partials = partials  # and with those of the launches before
        self._indices = [index for index, _ in members]
        while len(cuts) < power_of_2(len(members)):  # no program is these levels'
            cuts.append(cuts[-1]._replace(first=as_whole(programs)))
            self._indices.append(self._indices[-1])
        flags = (len(cuts), len(alike) == 4, vec, rows, cols, *(wanted or Pointers(False, False, False, False)))
        self._cuts, self._batch, self._how = cuts, batch, How(*map(constant, flags))
        kernel = elbo_levels_kernel if wanted is None else elbo_levels_grads_kernel
        self._launch = AnyLaunch(kernel, programs, **launch_options(batch), enable_fp_fusion=False)

    def rates(
        self, tensors: Sequence[Pointers], numbers: Numbers, partials: Tensor, barrier: Tensor, sums: Sums
    ) -> None:
        """`tensors`: of all levels of the hierarchy."""
        levels = tuple([Level(tensors[i], cut) for i, cut in zip(self._indices, self._cuts, strict=True)])
        work = Work(partials, None, None, None)
        self._launch(levels, LevelsCall(numbers, self._batch, self._how), work, barrier, sums)

    def gradients(
        self, tensors: Sequence[Pointers], gradients: Sequence[Pointers], numbers: Numbers, work: Work
    ) -> None:
        pairs = zip(self._indices, self._cuts, strict=True)
        levels = tuple([GradsLevel(tensors[i], gradients[i], cut) for i, cut in pairs])
        self._launch(levels, LevelsCall(numbers, self._batch, self._how), work)


def launch_options(batch: Batch) -> dict[str, Any]:
    """As many threads whatever a warp has. `at_most` is asked for so that ptxas does not spill."""
    if triton.knobs.runtime.interpret:
        return {}
    warps = WARPS * 32 // triton.runtime.driver.active.get_current_target().warp_size
    return {"num_warps": warps, **(at_most(80) if batch.ACC.value == tl.float32 else {})}


def walked(inputs: Inputs) -> list[Tensor]:
    """Two tensors, or four with a prior."""
    every = (inputs.mu, inputs.logvar, inputs.prior_mu, inputs.prior_logvar)
    return [t for t in every if t is not None]


def pointers_of(level: Sequence[Tensor | None]) -> Pointers:
    """Of mu and logvar, and of the prior's if there are such."""
    mu, logvar, *prior = [t for t in level if t is not None]
    return Pointers(mu, logvar, *(prior or (mu, logvar)))


def sums_of(batch: int, levels: int) -> Sequence[tl.constexpr]:
    """The last fields of `Sums`."""
    rows, most = min(128, power_of_2(batch)), power_of_2(levels)
    return [constant(n) for n in (rows, SUMS // rows, most, max(1, min(rows, SUMS // most)))]
