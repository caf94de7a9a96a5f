"""The operators of a hierarchy's levels, for any number of them.

    levels        Σ max(KL, free_bits) over the latents of each level, [B, L] if per_level, or of all levels, [B]
    levels_grads  the gradients of Σ grad · levels, for the tensors whose places in `tensors` are `wanted`
    rates         levels with its autograd node: what torch.compile and torch.export see (levels.py)

`tensors` has four for each level: mu, logvar, prior_mu, prior_logvar; the last two may be absent together. `grad` has
the shape of what levels returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..call import compute_dtype
from . import registry
from .registry import Operator


def _levels_fake(tensors: Any, free_bits: float, per_level: bool) -> Tensor:
    batch = tensors[0].shape[0]
    shape = (batch, len(tensors) // 4) if per_level else (batch,)
    return tensors[0].new_empty(shape, dtype=compute_dtype(*tensors))


def _levels_grads_fake(tensors: Any, free_bits: float, grad: Tensor, wanted: Any) -> list[Tensor]:
    return [torch.empty_like(tensors[i]) for i in wanted]


def _rates_fake(tensors: Any, free_bits: float, per_level: bool, backend: str | None) -> Tensor:
    return _levels_fake(tensors, free_bits, per_level)


_CALL_SCHEMA = "Tensor?[] tensors, float free_bits"
OPERATORS = (
    Operator("levels", f"({_CALL_SCHEMA}, bool per_level) -> Tensor", _levels_fake),
    Operator("levels_grads", f"({_CALL_SCHEMA}, Tensor grad, int[] wanted) -> Tensor[]", _levels_grads_fake),
)
AUTOGRAD = Operator("rates", f"({_CALL_SCHEMA}, bool per_level, str? backend) -> Tensor", _rates_fake)

registry.define((*OPERATORS, AUTOGRAD))


class Implementation(Protocol):
    """What a backend does for hierarchies, on the tensors that it serves."""

    def levels(self, tensors: Sequence[Tensor | None], free_bits: float, per_level: bool) -> Tensor: ...

    def levels_grads(
        self, tensors: Sequence[Tensor | None], free_bits: float, grad: Tensor, wanted: Sequence[int]
    ) -> list[Tensor]: ...


class Operators:
    """The operators of a namespace: an `Implementation`."""

    def __init__(self, namespace: str = "fused_elbo") -> None:
        self.levels, self.levels_grads = (registry.find(operator.name, namespace) for operator in OPERATORS)


def register(implementation: Implementation, key: str) -> None:
    """Put an implementation behind fused_elbo's operators, for a dispatch key."""
    registry.implement("levels", implementation.levels, key)
    registry.implement("levels_grads", implementation.levels_grads, key)
