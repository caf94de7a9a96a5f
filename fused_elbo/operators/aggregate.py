"""The operators of the aggregate posterior: log-densities of a mixture of posteriors, at many points at once.

    aggregate        log q̂(z_i) and log q̂(z_ik), q̂ the mixture of N(μ_j, exp l_j), j < M  -> joint [B], marginals [B, K]
    aggregate_grads  the gradients of Σ grad_joint·joint + Σ grad_marginals·marginals       -> of z, mu, logvar
    log_aggregate    aggregate with its autograd node: what torch.compile and torch.export see (aggregate.py)

z is [B, K], mu and logvar are [M, K], of one floating dtype and of any strides; B, M and K are at least 1. Where `own`
is not negative, component i + own is the one that z_i was drawn from. It weighs 1/N, and each other one
(N − 1)/(N (M − 1)), N being `dataset_size`, or M without one; otherwise all weigh 1/M.

joint and marginals have the compute dtype. A gradient has its tensor's dtype and the strides of `empty_like`; what no
bit of `mask` asks for (1: z, 2: mu, 4: logvar) has shape (0,). grad_joint or grad_marginals may be absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..call import compute_dtype
from . import registry
from .registry import Operator


class Mixture(NamedTuple):
    """How an operator's arguments begin."""

    z: Tensor
    mu: Tensor
    logvar: Tensor
    own: int = 0
    dataset_size: int | None = None


Sums = tuple[Tensor, Tensor]  # joint, marginals; or their gradients


def _aggregate_fake(*args: Any) -> Sums:
    z, dtype = args[0], compute_dtype(*args[:3])
    return z.new_empty(z.shape[:1], dtype=dtype), z.new_empty(z.shape, dtype=dtype)


def _grads_fake(*args: Any) -> tuple[Tensor, ...]:
    return asked(args[-1], args[0], lambda i: torch.empty_like(args[i]))


def asked(mask: int, like: Tensor, gradient: Callable[[int], Tensor]) -> tuple[Tensor, ...]:
    """The gradients whose bits are set, and empty tensors in the place of the others."""
    return tuple(gradient(i) if mask >> i & 1 else like.new_empty(0) for i in range(3))


_SCHEMA = "Tensor z, Tensor mu, Tensor logvar, int own, int? dataset_size"
_SUMS = "Tensor joint, Tensor marginals, Tensor? grad_joint, Tensor? grad_marginals"
OPERATORS = (
    Operator("aggregate", f"({_SCHEMA}) -> (Tensor, Tensor)", _aggregate_fake),
    Operator("aggregate_grads", f"({_SCHEMA}, {_SUMS}, int mask) -> (Tensor, Tensor, Tensor)", _grads_fake),
)
AUTOGRAD = Operator("log_aggregate", f"({_SCHEMA}, str? backend) -> (Tensor, Tensor)", _aggregate_fake)

registry.define((*OPERATORS, AUTOGRAD))


class Implementation(Protocol):
    """What a backend does for the aggregate posterior, on the tensors that it serves. The arguments are flat: a
    `Mixture`, then what the schema has besides."""

    def aggregate(self, z: Tensor, mu: Tensor, logvar: Tensor, own: int, dataset_size: int | None, /) -> Sums: ...

    def aggregate_grads(
        self,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        own: int,
        dataset_size: int | None,
        joint: Tensor,
        marginals: Tensor,
        grad_joint: Tensor | None,
        grad_marginals: Tensor | None,
        mask: int,
        /,
    ) -> tuple[Tensor, ...]: ...


class Operators:
    """The operators of a namespace: an `Implementation`."""

    def __init__(self, namespace: str = "fused_elbo") -> None:
        self.aggregate, self.aggregate_grads = (registry.find(operator.name, namespace) for operator in OPERATORS)


def register(implementation: Implementation, key: str) -> None:
    """Put an implementation behind fused_elbo's operators, for a dispatch key."""
    registry.implement("aggregate", implementation.aggregate, key)
    registry.implement("aggregate_grads", implementation.aggregate_grads, key)
