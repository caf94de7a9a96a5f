"""The operators of a hierarchy's levels (fused_elbo/operators/levels.py) on the Triton kernels, by plans as those of
operators.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fused_elbo.call import NONE, SUM, Options, Tensors, compute_dtype

from . import _layout
from ._grid import barrier_of
from ._layout import Inputs, empty_in_order, is_in_order, unit
from ._plan import Key, cached, device_guard, empty, key_of, on_meta
from .elbo_levels import MOST, Batch, LevelsLaunch, Member, Numbers, Pointers, Sums, Work, pointers_of, sums_of, walked
from .structs import PRESENT, constant, number, whole


class Plan:
    """What both plans start from. A key's other tensors are the gradient that comes in, and then all levels'."""

    def __init__(self, key: Key) -> None:
        self.given = [on_meta(shape) for shape in key.more[1:]]
        self.kinds, self.device, self.dtype = key.options, key.device, compute_dtype(*self.given)
        levels = [self.ordered(level) for level in in_fours(self.given)]
        self.inputs = [Inputs(level, key.options) for level in levels]
        self.size = self.inputs[0].batch
        pairs = [zip(a, b, strict=True) for a, b in zip(in_fours(self.given), map(latents_of, levels), strict=True)]
        self.copied = [any(a is not None and a.stride() != b.stride() for a, b in level) for level in pairs]

    def ordered(self, level: Sequence[Tensor | None]) -> Tensors:
        mu, logvar, prior_mu, prior_logvar = level
        tensors = Tensors(mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar)
        return _layout.ordered(tensors, self.kinds)

    def pointers(self, tensors: Sequence[Tensor | None]) -> list[Pointers]:
        levels = zip(in_fours(tensors), self.copied, strict=True)
        return [pointers_of(latents_of(self.ordered(level)) if copied else level) for level, copied in levels]

    def launches(self, wanted: Sequence[Pointers] | None) -> list[list[Member]]:
        """The levels of each launch: of the same dtypes, units and gradients, and at most MOST; one by itself if it
        needs 64-bit offsets. `wanted`: the gradients of each level."""
        alike: dict[Any, list[Member]] = {}
        most = MOST.value
        for i, inputs in enumerate(self.inputs):
            tensors, own = walked(inputs), None if wanted is None else wanted[i]
            if own is None or any(own):
                kind = (*[t.dtype for t in tensors], unit(tensors), own, inputs.wide and i)
                alike.setdefault(kind, []).append(Member(i, inputs))
        return [members[k : k + most] for members in alike.values() for k in range(0, len(members), most)]

    def batch(self, members: Sequence[Member]) -> Batch:
        acc = tl.float64 if self.dtype == torch.float64 else tl.float32
        wide, free_bits = constant(members[0].inputs.wide), PRESENT if self.kinds.free_bits else None
        return Batch(whole(self.size), whole(len(self.inputs)), constant(acc), wide, free_bits)


@cached
class Rates(Plan):
    def __init__(self, key: Key) -> None:
        super().__init__(key)
        self.calls: list[LevelsLaunch] = []
        partials = 0
        for members in self.launches(None):
            self.calls.append(LevelsLaunch(members, self.batch(members), None, partials))
            partials = self.calls[-1].partials
        per_level, levels = key.options.reduction == NONE, len(self.inputs)
        self.partials = empty((partials,), self.dtype, self.device)
        self.rates = empty((self.size, levels), self.dtype, self.device)
        self.total = nothing if per_level else empty((self.size,), self.dtype, self.device)
        self.how = sums_of(self.size, levels)

    def __call__(self, tensors: Sequence[Tensor | None], free_bits: float) -> Tensor:
        pointers, numbers = self.pointers(tensors), Numbers(number(free_bits, self.dtype))
        rates, total, partials = self.rates(), self.total(), self.partials()
        with device_guard(self.device):
            barrier = barrier_of(self.device)
            for launch in self.calls:
                launch.rates(pointers, numbers, partials, barrier, Sums(rates, total, *self.how))
        return rates if total is None else total


def nothing() -> None:
    return None


@cached
class RatesGrads(Plan):
    def __init__(self, key: Key) -> None:
        super().__init__(key)
        places = range(len(self.given))
        self.wanted = [i for i in places if key.mask >> i & 1]
        wanted = [Pointers._make(i in self.wanted for i in level) for level in in_fours(places)]
        groups = self.launches(wanted)
        self.calls = [LevelsLaunch(members, self.batch(members), wanted[members[0].index]) for members in groups]
        # What is not as the kernels write is written to a buffer first, in the order of its level.
        leads = {i: self.inputs[i // 4].mu for i in self.wanted}
        self.buffers = {i: lead for i, lead in leads.items() if not is_in_order(self.given[i], lead)}
        grad = on_meta(key.more[0])
        self.strides = [whole(stride) for stride in (*grad.stride(), 0)[:2]]

    def __call__(self, tensors: Sequence[Tensor | None], free_bits: float, grad: Tensor) -> dict[int, Tensor]:
        """By their places."""
        pointers, numbers = self.pointers(tensors), Numbers(number(free_bits, self.dtype))
        results = {i: torch.empty_like(tensors[i]) for i in self.wanted}
        buffers = {i: empty_in_order(lead, lead.dtype, self.device) for i, lead in self.buffers.items()}
        written = list(tensors)
        for i, t in (*results.items(), *buffers.items()):
            written[i] = t
        gradients = [pointers_of(level) for level in in_fours(written)]
        with device_guard(self.device):
            for launch in self.calls:
                launch.gradients(pointers, gradients, numbers, Work(None, grad, *self.strides))
        for i, buffer in buffers.items():
            results[i].copy_(buffer)
        return results


def in_fours(values: Sequence[Any]) -> list[Sequence[Any]]:
    """What belongs to each level."""
    return [values[i : i + 4] for i in range(0, len(values), 4)]


def latents_of(tensors: Tensors) -> tuple[Tensor | None, ...]:
    return tensors.mu, tensors.logvar, tensors.prior_mu, tensors.prior_logvar


def _key(tensors: Sequence[Tensor | None], free_bits: float, reduction: int, mask: int, grad: Tensor | None) -> Key:
    return key_of(Tensors(mu=tensors[0]), Options(free_bits=free_bits, reduction=reduction), mask, grad, *tensors)


def levels(tensors: Sequence[Tensor | None], free_bits: float, per_level: bool) -> Tensor:
    return Rates(_key(tensors, free_bits, NONE if per_level else SUM, 0, None))(tensors, free_bits)


def levels_grads(
    tensors: Sequence[Tensor | None], free_bits: float, grad: Tensor, wanted: Sequence[int]
) -> list[Tensor]:
    mask = sum(1 << i for i in wanted)
    found = RatesGrads(_key(tensors, free_bits, SUM, mask, grad))(tensors, free_bits, grad)
    return [found[i] for i in wanted]
