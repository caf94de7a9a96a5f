"""log q̂ of a mixture at many points: its joint density, and that of each latent.

Programs that share the components of a point write the logarithm of what theirs sum up to, and the logarithms are then
added up as densities are. So the `call.LogSums` of a launch are [B] and [B, K], or [blocks, B] and [splits, B, K].
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._math import add_exp, log_normal, merged_exp, no_exp, sum_exp, whole
from ._mixture import (
    JointCut,
    Walk,
    components_at,
    joint_densities,
    met,
    over_threads,
    owned_and_split,
    owned_latents,
    points_at,
    steps_of,
    with_own_weight,
    with_weights,
)

BLOCK = 256  # sums that a program finishes


class SumsCut(NamedTuple):
    programs: int  # of the marginals
    marginals: Walk
    joint: JointCut


class SumsTotalsCut(NamedTuple):
    programs: int  # of the marginals
    size: int  # of a part of the marginals
    splits: int
    points: int
    blocks: int
    BLOCK: tl.constexpr
    WIDE: tl.constexpr


@triton.jit
def marginal_sums(pid, out, call, walk):
    """Writes what the components of a split sum up to, for each latent of a block of points."""
    row, columns, split = owned_and_split(pid, walk)
    rows = row + tl.arange(0, walk.OWNED)
    is_latent, is_point = columns < whole(call.sizes.latents), rows < whole(call.sizes.points)
    z = points_at(rows[:, None], columns[None, :], is_point[:, None] & is_latent[None, :], call)
    largest, sum = no_exp((walk.OWNED, walk.LATENTS * walk.AT_ONCE), call.sizes.ACC)
    first, last = steps_of(split, walk)
    for step in range(first, last):
        components = met(step, walk)
        inside = (components < whole(call.sizes.components)) & is_latent
        mu, scale, constant = components_at(components, columns, inside, call)
        constant = with_weights(constant, components, call)[None, :]
        difference = z - mu[None, :]
        density = log_normal(difference, difference * scale[None, :], constant)
        density = with_own_weight(
            density, row, step * walk.AT_ONCE, walk.OWNED, walk.AT_ONCE, rows[:, None], components[None, :], call
        )
        largest, sum = add_exp(largest, sum, density)
    largest, sum = merged_exp(over_threads(largest, walk), over_threads(sum, walk), 1)
    columns = owned_latents(pid, walk)
    if call.sizes.WIDE:
        rows, split = rows.to(tl.int64), tl.full((), split, tl.int64)
    places = (split * whole(call.sizes.points) + rows)[:, None] * whole(call.sizes.latents) + columns[None, :]
    inside = is_point[:, None] & (columns < whole(call.sizes.latents))[None, :]
    tl.store(out + places, largest + tl.log(sum), inside)


@triton.jit
def joint_sums(pid, out, call, cut):
    """Writes what a block of components sums up to, for each of a block of points."""
    block = pid % whole(cut.blocks)
    row = pid // whole(cut.blocks) * cut.ROWS
    found = joint_densities(row, block * cut.COMPONENTS, whole(call.sizes.points), call, cut)
    rows = row + tl.arange(0, cut.ROWS)
    largest, sum = sum_exp(found, 1)
    tl.store(
        out + block * whole(call.sizes.points) + rows,
        largest + tl.log(sum),
        rows < whole(call.sizes.points),
    )


@triton.jit
def aggregate_sums_kernel(
    # inputs, and shapes
    call,
    # outputs
    sums,
    # tunables
    cut,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < whole(cut.programs):
        marginal_sums(pid, sums.marginals, call, cut.marginals)
    else:
        joint_sums(pid - whole(cut.programs), sums.joint, call, cut.joint)


@triton.jit
def total_of(pid, partials, out, size, parts, cut):
    """Adds up what is written of the same sums, as densities."""
    places = pid * cut.BLOCK + tl.arange(0, cut.BLOCK)
    inside = places < size
    if cut.WIDE:
        places, size = places.to(tl.int64), tl.full((), size, tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    largest, sum = no_exp((cut.BLOCK,), dtype)
    for part in range(0, parts):
        largest, sum = add_exp(largest, sum, tl.load(partials + part * size + places, inside, 0.0))
    tl.store(out + places, largest + tl.log(sum), inside)


@triton.jit
def aggregate_totals_kernel(
    # inputs
    partials,
    # outputs
    sums,
    # shapes, and tunables
    cut,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < whole(cut.programs):
        total_of(pid, partials.marginals, sums.marginals, whole(cut.size), whole(cut.splits), cut)
    else:
        total_of(pid - whole(cut.programs), partials.joint, sums.joint, whole(cut.points), whole(cut.blocks), cut)
