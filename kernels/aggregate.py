"""The operators of the aggregate posterior (fused_elbo/operators/aggregate.py) on the Triton kernels, by plans as those
of operators.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused_elbo.call import GradLogSums, LogSums, Mixture, MixtureGradients, Options, Tensors, compute_dtype
from fused_elbo.reference.math import mixture_log_weights

from . import _layout
from ._layout import cdiv, power_of_2
from ._mixture import THREADS, Call, JointCut, Pointers, Sizes, Strides, TensorStrides, Walk, Weights, launch_options
from ._plan import AnyLaunch, Key, at_most, cached, device_guard, empty, key_of, on_meta
from .aggregate_grads import (
    TOGETHER,
    Chunk,
    GradsCut,
    Incoming,
    Joint,
    Parts,
    TotalsCut,
    aggregate_grads_kernel,
    aggregate_grads_totals_kernel,
    aggregate_shares_kernel,
)
from .aggregate_sums import BLOCK, SumsCut, SumsTotalsCut, aggregate_sums_kernel, aggregate_totals_kernel
from .structs import constant, number, whole

FILL = 1024  # programs that keep any GPU busy: past that, none shares its walk with others
STEPS = 8  # of a walk that are worth a program
JOINT = (8, THREADS, 4)  # points, components and latents of a tile: twice as many of any take 144 registers
LEAST = 32  # components of a tile: a warp, which reduces them at once
OWNED, OWNED_GRADS = 16, 8  # points or components of a thread, in fp32
# Of points and components at once: 64 MiB, and two launches more for each chunk after the first. A walk could form them
# for itself, by a sum over the threads of its latents where one program has them all. That was tried at 64 latents: 4.2
# exponentials for an element, not 2.35, and 20% more instructions, counted while the PTX ran. 2²⁴ pairs are 66 billion
# instructions of a thread as it is, to which two launches add little.
SHARES = 1 << 24
UNEQUAL = 8  # a bit of a plan's mask beside the gradients': the components do not weigh alike


class Shared(NamedTuple):
    """A walk, with what the host has to know of it."""

    walk: Walk
    splits: int
    programs: int


class Plan:
    """What both plans start from. A key's other tensors are z, mu, logvar, and then what is the plan's own."""

    def __init__(self, key: Key) -> None:
        self.given, self.more = [on_meta(shape) for shape in key.more[:3]], [on_meta(shape) for shape in key.more[3:]]
        z, mu, _ = self.given
        self.device, self.dtype = key.device, compute_dtype(*self.given)
        self.points, (self.components, self.latents) = z.shape[0], mu.shape
        self.unequal, self.is_double = bool(key.mask & UNEQUAL), self.dtype == torch.float64

    def layout_with(self, *ends: int) -> tuple[TensorStrides, Sizes]:
        """What a call has of its own plan. `ends`: of other tensors that are read or written."""
        wide = max(*map(end_of, self.given), *ends) >= 2**31 or _layout.FORCE_WIDE
        acc = tl.float64 if self.is_double else tl.float32
        counts = map(whole, (self.points, self.components, self.latents))
        return TensorStrides(*map(strides_of, self.given)), Sizes(*counts, constant(acc), constant(wide))

    def call(self, mixture: Mixture) -> Call:
        own, others = mixture_log_weights(self.components, mixture.own >= 0, mixture.dataset_size)
        shift, more = whole(mixture.own) if self.unequal else None, number(own - others, self.dtype)
        return Call(Pointers(*mixture[:3]), Weights(number(others, self.dtype), more, shift), *self.layout)

    def joint(self) -> JointCut:
        counts = (self.points, max(self.components, LEAST), self.latents)
        tile = [min(most, power_of_2(n)) for most, n in zip(JOINT, counts, strict=True)]
        return JointCut(whole(cdiv(self.components, tile[1])), *map(constant, tile))

    def launch(self, kernel: object, programs: int) -> AnyLaunch:
        """`at_most` is asked for so that ptxas does not spill."""
        registers = {} if self.is_double else at_most(128)
        return AnyLaunch(kernel, programs, **launch_options(), **registers, enable_fp_fusion=False)

    def joint_blocks(self, cut: JointCut) -> int:
        return cdiv(self.components, cut.COMPONENTS.value)

    def joint_programs(self, points: int, cut: JointCut) -> int:
        return cdiv(points, cut.ROWS.value) * self.joint_blocks(cut)

    def walk(self, owned: int, met: int, most: int) -> Shared:
        """`most`: that a thread owns."""
        widths = [n for n in (128, 64, 32, 16) if n <= power_of_2(self.latents)] or [power_of_2(self.latents)]
        latents = min(widths, key=lambda n: cdiv(self.latents, n) * n)
        each = min(most // 2 if self.is_double else most, power_of_2(owned))
        blocks, at_once = cdiv(self.latents, latents), THREADS // latents
        owners, steps = cdiv(owned, each) * blocks, cdiv(met, at_once)
        per_split = cdiv(steps, max(1, min(cdiv(FILL, owners), steps // STEPS)))
        splits = cdiv(steps, per_split)
        walk = Walk(*map(whole, (blocks, splits, per_split)), *map(constant, (each, latents, at_once)))
        return Shared(walk, splits, owners * splits)


def end_of(t: Tensor) -> int:
    return sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


def stride_of(n: int) -> int | None:
    return None if n == 1 else whole(n)


def strides_of(t: Tensor) -> Strides:
    return Strides(*map(stride_of, t.stride()))


@cached
class Forward(Plan):
    def __init__(self, key: Key) -> None:
        super().__init__(key)
        walk, splits, programs = self.walk(self.points, self.components, OWNED)
        joint, size = self.joint(), self.points * self.latents
        blocks = self.joint_blocks(joint)
        self.layout = self.layout_with(splits * size, blocks * self.points)
        self.cut = SumsCut(whole(programs), walk, joint)
        self.sums = self.launch(aggregate_sums_kernel, programs + self.joint_programs(self.points, joint))
        shapes, counts = ((self.points,), (self.points, self.latents)), (blocks, splits)
        self.outputs = [empty(shape, self.dtype, self.device) for shape in shapes]
        # Where one program finds all, it writes the output.
        self.parts = [
            empty((n, *shape), self.dtype, self.device) if n > 1 else None
            for n, shape in zip(counts, shapes, strict=True)
        ]
        of_joint, of_marginals = cdiv(self.points, BLOCK) if blocks > 1 else 0, cdiv(size, BLOCK) if splits > 1 else 0
        self.totals_cut = SumsTotalsCut(
            *map(whole, (of_marginals, size, splits, self.points, blocks)), constant(BLOCK), self.layout[1].WIDE
        )
        self.totals = self.launch(aggregate_totals_kernel, of_marginals + of_joint) if any(self.parts) else None

    def __call__(self, mixture: Mixture) -> LogSums:
        outputs = LogSums(*[new() for new in self.outputs])
        parts = LogSums(*[out if new is None else new() for new, out in zip(self.parts, outputs, strict=True)])
        with device_guard(self.device):
            self.sums(self.call(mixture), parts, self.cut)
            if self.totals is not None:
                self.totals(parts, outputs, self.totals_cut)
        return outputs


@cached
class Gradients(Plan):
    """Its own tensors are joint, marginals and the gradients that come in."""

    def __init__(self, key: Key) -> None:
        super().__init__(key)
        joint, marginals, grad_joint, grad_marginals = self.more
        self.wanted = [i for i in range(3) if key.mask >> i & 1]
        at_once = self.points if grad_joint is None else max(1, min(self.points, SHARES // self.components))
        at_once = cdiv(self.points, cdiv(self.points, at_once))  # chunks of the same size, so that one walk serves all
        chunks = [(first, min(first + at_once, self.points)) for first in range(0, self.points, at_once)]
        of_points = self.walk(at_once, self.components, OWNED_GRADS)
        of_components = self.walk(self.components, at_once, OWNED_GRADS)
        sizes = [self.points * self.latents, *2 * [self.components * self.latents]]
        counts = [of_points.splits, *2 * [of_components.splits]]
        # What is written once is the result. What chunks add to is rounded at the end.
        in_parts = [counts[0] > 1, *2 * [counts[1] > 1 or len(chunks) > 1]]
        self.layout = self.layout_with(*sizes, *[end_of(t) for t in self.more if t is not None])

        results = [torch.empty_like(t) for t in self.given]
        dense = Strides(whole(self.latents), None)
        written = [dense if parts else strides_of(t) for parts, t in zip(in_parts, results, strict=True)]
        programs = of_points.programs if 0 in self.wanted else 0
        self.cut = GradsCut(
            strides_of(marginals), strides_of(marginals if grad_marginals is None else grad_marginals), *written,
            whole(sizes[0]), whole(sizes[1]), whole(programs), of_points.walk, of_components.walk,
        )  # fmt: skip
        self.joint_cut, together = self.joint(), TOGETHER.value
        room = self.joint_blocks(self.joint_cut) * self.joint_cut.COMPONENTS.value
        self.chunks = [Chunk(whole(first), whole(last), whole(room)) for first, last in chunks]
        all_programs = programs + (of_components.programs if self.wanted[-1] > 0 else 0)
        self.grads_launch = self.launch(aggregate_grads_kernel, all_programs)

        self.shares = None
        if grad_joint is not None:
            self.shares = empty((cdiv(at_once, together) * together, room), self.dtype, self.device)
            self.joint_strides = [stride_of(t.stride(0)) for t in (joint, grad_joint)]
            self.shares_launch = self.launch(aggregate_shares_kernel, self.joint_programs(at_once, self.joint_cut))

        self.parts = [
            empty((counts[i], sizes[i]), self.dtype, self.device) if i in self.wanted and in_parts[i] else None
            for i in range(3)
        ]
        blocks = [cdiv(size, BLOCK) if parts else 0 for size, parts in zip(sizes, self.parts, strict=True)]
        each = [
            Parts(strides_of(results[i]), whole(sizes[i]), whole(counts[i]), whole(sum(blocks[:i]))) for i in range(3)
        ]
        self.totals_cut = TotalsCut(*each, whole(self.latents), constant(BLOCK), self.layout[1].WIDE)
        self.totals = self.launch(aggregate_grads_totals_kernel, sum(blocks)) if any(self.parts) else None

    def __call__(self, mixture: Mixture, sums: LogSums, grad_sums: GradLogSums) -> MixtureGradients:
        results = MixtureGradients(*[torch.empty_like(mixture[i]) if i in self.wanted else None for i in range(3)])
        parts = MixtureGradients(*[None if new is None else new() for new in self.parts])
        first = MixtureGradients(*[r if part is None else part for r, part in zip(results, parts, strict=True)])
        shares = None if self.shares is None else self.shares()
        incoming = Incoming(shares, None if grad_sums.marginals is None else sums.marginals, grad_sums.marginals)
        call = self.call(mixture)
        with device_guard(self.device):
            for chunk in self.chunks:
                if shares is not None:
                    of_joint = Joint(sums.joint, grad_sums.joint, *self.joint_strides)
                    self.shares_launch(call, of_joint, chunk, shares, self.joint_cut)
                self.grads_launch(call, incoming, chunk, first, self.cut)
            if self.totals is not None:
                last = MixtureGradients(*[None if p is None else r for r, p in zip(results, parts, strict=True)])
                self.totals(parts, last, self.totals_cut)
        return results


def _key(mixture: Mixture, mask: int, *more: Tensor | None) -> tuple[object, ...]:
    components = mixture.mu.shape[0]
    unequal = mixture.own >= 0 and components > 1 and mixture.dataset_size not in (None, components)
    return key_of(Tensors(mu=mixture.mu), Options(), mask | (UNEQUAL if unequal else 0), *mixture[:3], *more)


def aggregate(mixture: Mixture) -> LogSums:
    return Forward(_key(mixture, 0))(mixture)


def aggregate_grads(mixture: Mixture, sums: LogSums, grad_sums: GradLogSums, mask: int) -> MixtureGradients:
    if not mask or not any(t is not None for t in grad_sums):
        return MixtureGradients(*[torch.zeros_like(t) if mask >> i & 1 else None for i, t in enumerate(mixture[:3])])
    return Gradients(_key(mixture, mask, *sums, *grad_sums))(mixture, sums, grad_sums)
