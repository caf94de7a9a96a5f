"""The gradients of log q̂ of a mixture: of points by the threads that own them, of components by those that own these.

A point and a component meet with the factor W_ijk = g_i p_ij + h_ik r_ijk (fused_elbo/reference/aggregate.py). The
shares g_i p_ij, each of which needs all latents, are written beforehand, for as many points at a time as there is
memory for; what components have from one chunk of points is added to what they have from those before. Programs that
share a walk write parts of a gradient, which are then added up.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._math import exp_of, log_normal, log_normal_slopes, whole
from ._mixture import (
    Strides,
    Walk,
    along,
    at,
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

TOGETHER = tl.constexpr(8)  # what threads own divides it


class Chunk(NamedTuple):
    """Points, which have their shares at once."""

    first: int
    last: int  # one past it
    components: int  # for whose shares there is room


class Joint(NamedTuple):
    """Of each point: log q̂, and the gradient that comes in."""

    sums: Tensor
    grad: Tensor
    sums_stride: int | None
    grad_stride: int | None


class Incoming(NamedTuple):
    """None where there is no such gradient."""

    shares: Tensor | None  # of a chunk, [points / TOGETHER, components, TOGETHER]
    marginals: Tensor | None
    grad: Tensor | None


class GradsCut(NamedTuple):
    marginals: Strides
    grad: Strides
    z: Strides  # of what is written, as the next two
    mu: Strides
    logvar: Strides
    points_part: int  # elements from a part to the next
    components_part: int
    programs: int  # that own points
    points: Walk
    components: Walk


class Parts(NamedTuple):
    """Of a gradient."""

    strides: Strides  # of the gradient
    size: int
    parts: int
    first: int  # of the programs that add them up


class TotalsCut(NamedTuple):
    z: Parts
    mu: Parts
    logvar: Parts
    latents: int
    BLOCK: tl.constexpr
    WIDE: tl.constexpr


@triton.jit
def aggregate_shares_kernel(
    # inputs, and shapes
    call, joint, chunk,
    # outputs
    shares,
    # tunables
    cut,
):  # fmt: skip
    block = tl.program_id(0) % whole(cut.blocks)
    row = tl.program_id(0) // whole(cut.blocks) * cut.ROWS
    own = row + tl.arange(0, cut.ROWS)
    rows, components = whole(chunk.first) + own, block * cut.COMPONENTS + tl.arange(0, cut.COMPONENTS)
    inside = rows < whole(chunk.last)
    sums = tl.load(joint.sums + along(rows, joint.sums_stride, call.sizes.WIDE), inside, 0.0).to(call.sizes.ACC)
    grad = tl.load(joint.grad + along(rows, joint.grad_stride, call.sizes.WIDE), inside, 0.0).to(call.sizes.ACC)
    density = joint_densities(whole(chunk.first) + row, block * cut.COMPONENTS, whole(chunk.last), call, cut)
    share = tl.where(inside[:, None], grad[:, None] * exp_of(density - sums[:, None]), 0.0)
    tl.store(shares + share_rows(own, chunk)[:, None] + components[None, :] * TOGETHER, share)


@triton.jit
def share_rows(rows, chunk):
    """Returns where shares of points of a chunk begin. Those of TOGETHER points with a component lie side by side: so
    whatever a thread owns, its shares have one address and constants that are added to it."""
    return rows.to(tl.int64) // TOGETHER * (TOGETHER * whole(chunk.components)) + rows % TOGETHER


@triton.jit
def sums_at(rows, columns, inside, incoming, call, cut):
    """Reads the marginals of points, and the gradient that comes in. A point that is not there has an infinite density,
    and so no component has a share in it."""
    if incoming.grad is None:
        sums = tl.zeros(inside.shape, call.sizes.ACC)
        return sums, sums
    else:
        sums = tl.load(incoming.marginals + at(rows, columns, cut.marginals, call.sizes.WIDE), inside, float("inf"))
        grad = tl.load(incoming.grad + at(rows, columns, cut.grad, call.sizes.WIDE), inside, 0.0)
        return sums.to(call.sizes.ACC), grad.to(call.sizes.ACC)


@triton.jit
def factors(density, sums, grad, incoming, places, inside):
    """Returns W where points and components meet. places: of their shares"""
    if incoming.shares is None:
        return grad * exp_of(density - sums)
    else:
        share = tl.load(incoming.shares + places, inside, 0.0)
        if incoming.grad is None:
            return tl.broadcast_to(share, density.shape)
        else:
            return tl.fma(tl.broadcast_to(grad, density.shape), exp_of(density - sums), share)


@triton.jit
def write_owned(places, found, inside, is_later, walk):
    """Adds up what the threads of the same latent have found, and writes it, or `is_later` adds it to what is there."""
    found = tl.sum(over_threads(found, walk), 1)
    if is_later:
        found += tl.load(places, inside, 0.0).to(found.dtype)
    tl.store(places, found.to(places.dtype.element_ty), inside)


@triton.jit
def point_gradients(pid, out, incoming, call, chunk, cut):
    """Writes ∂z of the points that the program owns, or a part of it."""
    own, columns, split = owned_and_split(pid, cut.points)
    row, each = whole(chunk.first) + own, tl.arange(0, cut.points.OWNED)
    rows = row + each
    is_latent = columns < whole(call.sizes.latents)
    is_point = (rows < whole(chunk.last))[:, None] & is_latent[None, :]
    z = points_at(rows[:, None], columns[None, :], is_point, call)
    sums, grad = sums_at(rows[:, None], columns[None, :], is_point, incoming, call, cut)
    found = tl.zeros(z.shape, call.sizes.ACC)
    first, last = steps_of(split, cut.points)
    for step in range(first, last):
        components = met(step, cut.points)
        is_component = components < whole(call.sizes.components)
        mu, scale, constant = components_at(components, columns, is_component & is_latent, call)
        constant = with_weights(constant, components, call)[None, :]
        difference = z - mu[None, :]
        scaled = difference * scale[None, :]
        density = log_normal(difference, scaled, constant)
        density = with_own_weight(
            density, row, step * cut.points.AT_ONCE, cut.points.OWNED, cut.points.AT_ONCE,
            rows[:, None], components[None, :], call,
        )  # fmt: skip
        # Threads that were laid along neighbours, to load them at once, would have to exchange what they loaded.
        places = tl.max_contiguous((share_rows(own, chunk) + components * TOGETHER)[None, :] + each[:, None], [1, 1])
        slope, _ = log_normal_slopes(difference, scaled)
        found = tl.fma(factors(density, sums, grad, incoming, places, is_component[None, :]), slope, found)
    columns = owned_latents(pid, cut.points)
    inside = (rows < whole(chunk.last))[:, None] & (columns < whole(call.sizes.latents))[None, :]
    places = along(split, cut.points_part, True) + at(rows[:, None], columns[None, :], cut.z, call.sizes.WIDE)
    write_owned(out + places, 2.0 * found, inside, False, cut.points)


@triton.jit
def component_gradients(pid, gradients, incoming, call, chunk, cut):
    """Writes ∂μ and ∂l of the components that the program owns, or parts of them."""
    component, columns, split = owned_and_split(pid, cut.components)
    each = tl.arange(0, cut.components.OWNED)
    components = component + each
    is_latent = columns < whole(call.sizes.latents)
    inside = (components < whole(call.sizes.components))[:, None] & is_latent[None, :]
    mu, scale, constant = components_at(components[:, None], columns[None, :], inside, call)
    constant = with_weights(constant, components[:, None], call)
    of_mu, of_logvar = tl.zeros(mu.shape, call.sizes.ACC), tl.zeros(mu.shape, call.sizes.ACC)
    first, last = steps_of(split, cut.components)
    for step in range(first, last):
        own = met(step, cut.components)
        rows = whole(chunk.first) + own
        is_point = rows < whole(chunk.last)
        z = points_at(rows, columns, is_point & is_latent, call)
        sums, grad = sums_at(rows, columns, is_point & is_latent, incoming, call, cut)
        difference = z[None, :] - mu
        scaled = difference * scale
        density = log_normal(difference, scaled, constant)
        density = with_own_weight(
            density, whole(chunk.first) + step * cut.components.AT_ONCE, component, cut.components.AT_ONCE,
            cut.components.OWNED, rows[None, :], components[:, None], call,
        )  # fmt: skip
        places = (share_rows(own, chunk) + component * TOGETHER)[None, :] + (each * TOGETHER)[:, None]
        factor = factors(density, sums[None, :], grad[None, :], incoming, places, is_point[None, :])
        slope, slope_of_logvar = log_normal_slopes(difference, scaled)
        of_mu = tl.fma(factor, slope, of_mu)
        of_logvar = tl.fma(factor, slope_of_logvar, of_logvar)
    columns, part = owned_latents(pid, cut.components), along(split, cut.components_part, True)
    inside = (components < whole(call.sizes.components))[:, None] & (columns < whole(call.sizes.latents))[None, :]
    is_later = whole(chunk.first) > 0
    if gradients.mu is not None:
        places = part + at(components[:, None], columns[None, :], cut.mu, call.sizes.WIDE)
        write_owned(gradients.mu + places, -2.0 * of_mu, inside, is_later, cut.components)
    if gradients.logvar is not None:
        places = part + at(components[:, None], columns[None, :], cut.logvar, call.sizes.WIDE)
        write_owned(gradients.logvar + places, -of_logvar, inside, is_later, cut.components)


@triton.jit
def aggregate_grads_kernel(
    # inputs, and shapes
    call, incoming, chunk,
    # outputs
    gradients,
    # shapes, and tunables
    cut,
):  # fmt: skip
    pid = tl.program_id(0)
    if gradients.z is not None and pid < whole(cut.programs):
        point_gradients(pid, gradients.z, incoming, call, chunk, cut)
    if (gradients.mu is not None or gradients.logvar is not None) and pid >= whole(cut.programs):
        component_gradients(pid - whole(cut.programs), gradients, incoming, call, chunk, cut)


@triton.jit
def total_of(pid, parts, out, of, cut):
    """Adds up the parts of a block of a gradient, in their order."""
    places = pid * cut.BLOCK + tl.arange(0, cut.BLOCK)
    inside = places < whole(of.size)
    found = tl.zeros((cut.BLOCK,), parts.dtype.element_ty)
    for part in range(0, whole(of.parts)):
        found += tl.load(parts + tl.full((), part, tl.int64) * whole(of.size) + places, inside, 0.0)
    rows, columns = places // whole(cut.latents), places % whole(cut.latents)
    tl.store(out + at(rows, columns, of.strides, cut.WIDE), found.to(out.dtype.element_ty), inside)


@triton.jit
def aggregate_grads_totals_kernel(
    # inputs
    parts,
    # outputs
    gradients,
    # shapes, and tunables
    cut,
):  # fmt: skip
    pid = tl.program_id(0)
    if gradients.z is not None and pid < whole(cut.mu.first):
        total_of(pid, parts.z, gradients.z, cut.z, cut)
    if gradients.mu is not None and pid >= whole(cut.mu.first) and pid < whole(cut.logvar.first):
        total_of(pid - whole(cut.mu.first), parts.mu, gradients.mu, cut.mu, cut)
    if gradients.logvar is not None and pid >= whole(cut.logvar.first):
        total_of(pid - whole(cut.logvar.first), parts.logvar, gradients.logvar, cut.logvar, cut)
