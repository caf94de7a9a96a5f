"""A mixture of N(μ_j, exp l_j), as the kernels of the aggregate posterior see it: strides, weights, densities."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._math import log_normal_terms, number, whole
from .structs import Number

THREADS = 128  # of a program: each holds a latent of some points, or components, and meets the others one by one


class Pointers(NamedTuple):
    """Of the tensors of a `call.Mixture`."""

    z: Tensor
    mu: Tensor
    logvar: Tensor


class Weights(NamedTuple):
    """log w_ij."""

    others: Number
    own: Number  # of component i + shift, less that of the others
    shift: int | None  # None: all weigh alike


class Strides(NamedTuple):
    """None stands for 1."""

    row: int | None
    column: int | None


class Sizes(NamedTuple):
    points: int
    components: int
    latents: int
    ACC: tl.constexpr
    WIDE: tl.constexpr  # whether offsets need 64 bits


class TensorStrides(NamedTuple):
    z: Strides
    mu: Strides
    logvar: Strides


class Call(NamedTuple):
    """`strides` and `sizes` are what a plan keeps. Integers are as `structs.whole` makes them."""

    tensors: Pointers
    weights: Weights
    strides: TensorStrides
    sizes: Sizes


class JointCut(NamedTuple):
    """A tile of [points, components], for which a program walks all latents."""

    blocks: int  # of components
    ROWS: tl.constexpr
    COMPONENTS: tl.constexpr
    LATENTS: tl.constexpr  # at a time


class Walk(NamedTuple):
    """A thread owns one latent of OWNED points and walks components, or the other way round. A program has AT_ONCE
    threads for each of its latents."""

    blocks: int  # of latents
    splits: int  # programs that share the walk
    steps: int  # of a program
    OWNED: tl.constexpr
    LATENTS: tl.constexpr
    AT_ONCE: tl.constexpr


@triton.jit
def along(n, stride, WIDE: tl.constexpr):
    """Returns offsets."""
    if WIDE:
        n = n.to(tl.int64)
    if stride is None:
        return n
    else:
        return n * whole(stride)


@triton.jit
def at(rows, columns, strides, WIDE: tl.constexpr):
    """Returns the offsets of a matrix' elements."""
    return along(rows, strides.row, WIDE) + along(columns, strides.column, WIDE)


@triton.jit
def points_at(rows, columns, inside, call):
    """Reads z; 0 outside."""
    return tl.load(call.tensors.z + at(rows, columns, call.strides.z, call.sizes.WIDE), inside, 0.0).to(call.sizes.ACC)


@triton.jit
def components_at(rows, columns, inside, call):
    """Reads μ, and l for s and c of `log_normal_terms`; 0 outside."""
    mu = tl.load(call.tensors.mu + at(rows, columns, call.strides.mu, call.sizes.WIDE), inside, 0.0).to(call.sizes.ACC)
    logvar = tl.load(call.tensors.logvar + at(rows, columns, call.strides.logvar, call.sizes.WIDE), inside, 0.0)
    scale, constant = log_normal_terms(logvar.to(call.sizes.ACC))
    return mu, scale, constant


@triton.jit
def with_weights(constant, components, call):
    """Adds log w to log-densities, that of the others to all; −∞ for components that are not there."""
    others = number(call.weights.others, constant.dtype)
    return tl.where(components < whole(call.sizes.components), constant + others, float("-inf"))


@triton.jit
def with_own_weight(density, row, component, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, rows, components, call):
    """Adds what the weight of a point's own component is more than the others'. `row` and `component` are the first of
    those that meet. Few meet their own, and the others are spared a fifth of the instructions."""
    if call.weights.shift is None:
        return density
    else:
        first = row + whole(call.weights.shift)
        if (first < component + COMPONENTS) & (component < first + ROWS):
            own = number(call.weights.own, density.dtype)
            density += tl.where(components == rows + whole(call.weights.shift), own, 0.0)
        return density


@triton.jit
def joint_densities(row, component, last, call, cut):
    """Returns log w_ij Π_k N(z_ik; …) of a tile, whose points end before the `last`."""
    rows, components = row + tl.arange(0, cut.ROWS), component + tl.arange(0, cut.COMPONENTS)
    found = tl.zeros((cut.ROWS, cut.COMPONENTS), call.sizes.ACC)
    for first in range(0, whole(call.sizes.latents), cut.LATENTS):
        columns = first + tl.arange(0, cut.LATENTS)
        is_latent = columns < whole(call.sizes.latents)
        # A point that is not there is the last one: with no mask of its own, a load takes half the instructions.
        z = points_at(tl.minimum(rows, last - 1)[:, None], columns[None, :], is_latent[None, :], call)
        inside = is_latent[:, None] & (components < whole(call.sizes.components))[None, :]
        mu, scale, constant = components_at(components[None, :], columns[:, None], inside, call)
        difference = z[:, :, None] - mu[None, :, :]
        found += tl.sum(difference * scale[None, :, :] * difference, 1)
        found += tl.sum(tl.where(inside, constant, 0.0), 0)[None, :]
    found = with_weights(found, components[None, :], call)
    return with_own_weight(found, row, component, cut.ROWS, cut.COMPONENTS, rows[:, None], components[None, :], call)


@triton.jit
def owned_and_split(pid, walk):
    """Returns the first point, or component, that the pid-th program owns, its threads' latents, and its split."""
    split, block = pid % whole(walk.splits), pid // whole(walk.splits)
    lanes = tl.arange(0, walk.LATENTS * walk.AT_ONCE)
    columns = block % whole(walk.blocks) * walk.LATENTS + lanes % walk.LATENTS
    return block // whole(walk.blocks) * walk.OWNED, columns, split


@triton.jit
def owned_latents(pid, walk):
    """Returns the latents that the pid-th program owns, once each."""
    return pid // whole(walk.splits) % whole(walk.blocks) * walk.LATENTS + tl.arange(0, walk.LATENTS)


@triton.jit
def over_threads(found, walk):
    """Returns what threads hold, with an axis for those of the same latent."""
    return tl.reshape(found, (walk.OWNED, walk.AT_ONCE, walk.LATENTS))


@triton.jit
def met(step, walk):
    """Returns what the threads meet in a step."""
    return step * walk.AT_ONCE + tl.arange(0, walk.LATENTS * walk.AT_ONCE) // walk.LATENTS


@triton.jit
def steps_of(split, walk):
    """Returns the first step of a split, and the one past its last."""
    return split * whole(walk.steps), (split + 1) * whole(walk.steps)


def launch_options() -> dict[str, Any]:
    """As many threads whatever a warp has."""
    if triton.knobs.runtime.interpret:
        return {}
    return {"num_warps": THREADS // triton.runtime.driver.active.get_current_target().warp_size}
