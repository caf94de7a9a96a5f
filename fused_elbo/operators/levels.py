"""The operators of a hierarchy's levels, for any number of them.

    levels        Σ over the levels of max(KL, free_bits), [B]
    levels_grads  its gradients, for the tensors whose places in `tensors` are `wanted`
    rates         levels with its autograd node: what torch.compile and torch.export see (levels.py)

`tensors` has four for each level: mu, logvar, prior_mu, prior_logvar; the last two may be absent together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import compute_dtype
from . import registry
from .registry import Operator


def _levels_fake(tensors: Any, free_bits: float) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape[0], dtype=compute_dtype(*tensors))


def _levels_grads_fake(tensors: Any, free_bits: float, grad: Tensor, wanted: Any) -> list[Tensor]:
    return [torch.empty_like(tensors[i]) for i in wanted]


def _rates_fake(tensors: Any, free_bits: float, backend: str | None) -> Tensor:
    return _levels_fake(tensors, free_bits)


_CALL_SCHEMA = "Tensor?[] tensors, float free_bits"
OPERATORS = (
    Operator("levels", f"({_CALL_SCHEMA}) -> Tensor", _levels_fake),
    Operator("levels_grads", f"({_CALL_SCHEMA}, Tensor grad, int[] wanted) -> Tensor[]", _levels_grads_fake),
)
AUTOGRAD = Operator("rates", f"({_CALL_SCHEMA}, str? backend) -> Tensor", _rates_fake)

registry.define((*OPERATORS, AUTOGRAD))

levels = registry.find("levels")
levels_grads = registry.find("levels_grads")
