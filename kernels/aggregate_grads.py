"""The gradients of log q̂ of a mixture: of points by the threads that own them, of components by those that own these.

A point and a component meet with the factor W_ijk = g_i p_ij + h_ik r_ijk (fused_elbo/reference/aggregate.py). The
shares g_i p_ij, each of which needs all latents, are written beforehand, for as many points at a time as there is
memory for. Programs that share a walk write parts of a gradient, which are then added up.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._math import log_normal_slopes, whole
from ._mixture import (
    Strides,
    Walk,
    along,
    at,
    components_at,
    densities,
    joint_densities,
    met,
    owned_and_split,
    points_at,
    steps_of,
    with_weights,
)


class Chunk(NamedTuple):
    """Points, which have their shares at once."""

    first: int
    last: int  # one past it
    index: int


class Joint(NamedTuple):
    """Of each point: log q̂, and the gradient that comes in."""

    sums: Tensor
    grad: Tensor
    sums_stride: int | None
    grad_stride: int | None


class Incoming(NamedTuple):
    """None where there is no such gradient."""

    shares: Tensor | None  # [points of the chunk, components]
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
    sizes = call.layout.sizes
    block = tl.program_id(0) % whole(cut.blocks)
    rows = whole(chunk.first) + tl.program_id(0) // whole(cut.blocks) * cut.ROWS + tl.arange(0, cut.ROWS)
    components = block * cut.COMPONENTS + tl.arange(0, cut.COMPONENTS)
    inside = rows < whole(chunk.last)
    sums = tl.load(joint.sums + along(rows, joint.sums_stride, sizes.WIDE), inside, 0.0).to(sizes.ACC)
    grad = tl.load(joint.grad + along(rows, joint.grad_stride, sizes.WIDE), inside, 0.0).to(sizes.ACC)
    density = joint_densities(rows, components, whole(chunk.last), call, cut.LATENTS)
    share = grad[:, None] * tl.exp(density - sums[:, None])
    tl.store(
        shares + shares_at(rows[:, None], components[None, :], chunk, sizes),
        share,
        inside[:, None] & (components < whole(sizes.components))[None, :],
    )


@triton.jit
def shares_at(rows, components, chunk, sizes):
    return at(rows - whole(chunk.first), components, Strides(sizes.components, None), sizes.WIDE)


@triton.jit
def sums_at(rows, columns, inside, incoming, call, cut):
    """Reads the marginals of points, and the gradient that comes in. A point that is not there has an
    infinite density, and so no component has a share in it."""
    sizes = call.layout.sizes
    if incoming.grad is None:
        sums = tl.zeros(inside.shape, sizes.ACC)
        return sums, sums
    else:
        sums = tl.load(incoming.marginals + at(rows, columns, cut.marginals, sizes.WIDE), inside, float("inf"))
        grad = tl.load(incoming.grad + at(rows, columns, cut.grad, sizes.WIDE), inside, 0.0)
        return sums.to(sizes.ACC), grad.to(sizes.ACC)


@triton.jit
def factors(density, rows, components, sums, grad, incoming, chunk, sizes):
    """Returns W where points and components meet."""
    if incoming.shares is None:
        return grad * tl.exp(density - sums)
    else:
        inside = (rows < whole(chunk.last)) & (components < whole(sizes.components))
        share = tl.load(incoming.shares + shares_at(rows, components, chunk, sizes), inside, 0.0)
        if incoming.grad is None:
            return tl.broadcast_to(share, density.shape)
        else:
            responsibility = tl.exp(density - sums)
            return tl.fma(tl.broadcast_to(grad, density.shape), responsibility, share)


@triton.jit
def write_owned(out, found, pid, first, last, strides, walk, sizes):
    """Adds up what the threads of the same points, or components, have found, and writes it."""
    rows, _, _ = owned_and_split(pid, walk)
    columns = pid // whole(walk.splits) % whole(walk.blocks) * walk.LATENTS + tl.arange(0, walk.LATENTS)
    found = tl.sum(tl.reshape(found, (walk.OWNED, walk.AT_ONCE, walk.LATENTS)), 1)
    inside = (first + rows < last)[:, None] & (columns < whole(sizes.latents))[None, :]
    places = at(first + rows[:, None], columns[None, :], strides, sizes.WIDE)
    tl.store(out + places, found.to(out.dtype.element_ty), inside)


@triton.jit
def point_gradients(pid, out, incoming, call, chunk, cut):
    """Writes ∂z of the points that the program owns, or a part of it."""
    sizes = call.layout.sizes
    rows, columns, split = owned_and_split(pid, cut.points)
    rows += whole(chunk.first)
    inside = (rows < whole(chunk.last))[:, None] & (columns < whole(sizes.latents))[None, :]
    z = points_at(rows[:, None], columns[None, :], inside, call)
    sums, grad = sums_at(rows[:, None], columns[None, :], inside, incoming, call, cut)
    found = tl.zeros(z.shape, sizes.ACC)
    first, last = steps_of(split, cut.points)
    for step in range(first, last):
        components = met(step, cut.points)
        inside = (components < whole(sizes.components)) & (columns < whole(sizes.latents))
        mu, scale, constant = components_at(components, columns, inside, call)
        constant = with_weights(constant, components, call)[None, :]
        difference = z - mu[None, :]
        scaled = difference * scale[None, :]
        density = densities(difference, scaled, constant, rows[:, None], components[None, :], call)
        factor = factors(density, rows[:, None], components[None, :], sums, grad, incoming, chunk, sizes)
        slope, _ = log_normal_slopes(difference, scaled)
        found = tl.fma(factor, slope, found)
    part = along(split, cut.points_part, True)
    write_owned(out + part, 2.0 * found, pid, whole(chunk.first), whole(chunk.last), cut.z, cut.points, sizes)


@triton.jit
def component_gradients(pid, gradients, incoming, call, chunk, cut):
    """Writes ∂μ and ∂l of the components that the program owns, or parts of them."""
    sizes = call.layout.sizes
    components, columns, split = owned_and_split(pid, cut.components)
    is_latent = columns < whole(sizes.latents)
    inside = (components < whole(sizes.components))[:, None] & is_latent[None, :]
    mu, scale, constant = components_at(components[:, None], columns[None, :], inside, call)
    constant = with_weights(constant, components[:, None], call)
    of_mu, of_logvar = tl.zeros(mu.shape, sizes.ACC), tl.zeros(mu.shape, sizes.ACC)
    first, last = steps_of(split, cut.components)
    for step in range(first, last):
        rows = whole(chunk.first) + met(step, cut.components)
        is_point = (rows < whole(chunk.last)) & is_latent
        z = points_at(rows, columns, is_point, call)
        sums, grad = sums_at(rows, columns, is_point, incoming, call, cut)
        difference = z[None, :] - mu
        scaled = difference * scale
        density = densities(difference, scaled, constant, rows[None, :], components[:, None], call)
        factor = factors(
            density, rows[None, :], components[:, None], sums[None, :], grad[None, :], incoming, chunk, sizes
        )
        slope, slope_of_logvar = log_normal_slopes(difference, scaled)
        of_mu = tl.fma(factor, slope, of_mu)
        of_logvar = tl.fma(factor, slope_of_logvar, of_logvar)
    part = along(whole(chunk.index) * whole(cut.components.splits) + split, cut.components_part, True)
    last = whole(sizes.components)
    if gradients.mu is not None:
        write_owned(gradients.mu + part, -2.0 * of_mu, pid, 0, last, cut.mu, cut.components, sizes)
    if gradients.logvar is not None:
        write_owned(gradients.logvar + part, -of_logvar, pid, 0, last, cut.logvar, cut.components, sizes)


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
        found += tl.load(parts + along(part, of.size, True) + places, inside, 0.0)
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
