"""The operators of the aggregate posterior: log-densities of a mixture of posteriors, at many points at once.

    aggregate        log q̂(z_i) and log q̂(z_ik), q̂ the mixture of N(μ_j, exp l_j), j < M  -> LogSums
    aggregate_grads  the gradients of Σ grad_joint·joint + Σ grad_marginals·marginals       -> MixtureGradients
    log_aggregate    aggregate with its autograd node: what torch.compile and torch.export see (aggregate.py)

All take a call's `Mixture`, flat, and then what they have besides. `Implementation`, `kernels_of` and `Operators` are
what elbo.py says of its own.

z is [B, K], mu and logvar are [M, K], of one floating dtype and of any strides; B, M and K are at least 1. Where `own`
is not negative, component i + own is the one that z_i was drawn from. It weighs 1/N, and each other one
(N − 1)/(N (M − 1)), N being `dataset_size`, or M without one; otherwise all weigh 1/M.

joint and marginals have the compute dtype. A gradient has its tensor's dtype and the strides of `empty_like`; what no
bit of `mask` asks for (1: z, 2: mu, 4: logvar) has shape (0,). grad_joint or grad_marginals may be absent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..call import GradLogSums, LogSums, Mixture, MixtureGradients, compute_dtype, returns, schema
from . import registry
from .registry import Operator

MIXTURE, _LOG_SUMS = len(Mixture._fields), len(LogSums._fields)


class Implementation(Protocol):
    """What a backend does for the aggregate posterior, on the tensors that it serves."""

    def aggregate(self, mixture: Mixture) -> tuple[Tensor, ...]:
        """As `LogSums`."""
        ...

    def aggregate_grads(
        self, mixture: Mixture, sums: LogSums, grad_sums: GradLogSums, mask: int
    ) -> tuple[Tensor | None, ...]:
        """As `MixtureGradients`; what the mask does not ask for may be None."""
        ...


def _aggregate_fake(*args: Any) -> LogSums:
    mixture = Mixture._make(args[:MIXTURE])
    z, dtype = mixture.z, compute_dtype(*mixture[:3])
    return LogSums(z.new_empty(z.shape[:1], dtype=dtype), z.new_empty(z.shape, dtype=dtype))


def _grads_fake(*args: Any) -> tuple[Tensor, ...]:
    mixture, mask = Mixture._make(args[:MIXTURE]), args[-1]
    return _present([torch.empty_like(t) if mask >> i & 1 else None for i, t in enumerate(mixture[:3])], mixture)


def _present(gradients: Sequence[Tensor | None], mixture: Mixture) -> tuple[Tensor, ...]:
    return tuple([mixture.z.new_empty(0) if t is None else t for t in gradients])


_GRADS_SCHEMA = f"{schema(Mixture)}, {schema(LogSums)}, {schema(GradLogSums, 'grad_')}, int mask"
_SUMS, _GRADIENTS = returns(_LOG_SUMS), returns(len(MixtureGradients._fields))
OPERATORS = (
    Operator("aggregate", f"({schema(Mixture)}) -> {_SUMS}", _aggregate_fake),
    Operator("aggregate_grads", f"({_GRADS_SCHEMA}) -> {_GRADIENTS}", _grads_fake),
)
AUTOGRAD = Operator("log_aggregate", f"({schema(Mixture)}, str? backend) -> {_SUMS}", _aggregate_fake)

registry.define((*OPERATORS, AUTOGRAD))


class Operators:
    """The operators of a namespace, called with structures."""

    def __init__(self, namespace: str = "fused_elbo") -> None:
        self._aggregate, self._grads = (registry.find(operator.name, namespace) for operator in OPERATORS)

    def aggregate(self, mixture: Mixture) -> tuple[Tensor, ...]:
        return self._aggregate(*mixture)

    def aggregate_grads(self, mixture: Mixture, sums: LogSums, grad_sums: GradLogSums, mask: int) -> tuple[Tensor, ...]:
        return self._grads(*mixture, *sums, *grad_sums, mask)


def kernels_of(implementation: Implementation) -> dict[str, Callable[..., Any]]:
    """Flat kernels, by the operators' names."""

    def aggregate(*args: Any) -> tuple[Tensor, ...]:
        return implementation.aggregate(Mixture._make(args))

    def aggregate_grads(*args: Any) -> tuple[Tensor, ...]:
        mixture, (*given, mask) = Mixture._make(args[:MIXTURE]), args[MIXTURE:]
        sums, grad_sums = LogSums._make(given[:_LOG_SUMS]), GradLogSums._make(given[_LOG_SUMS:])
        return _present(implementation.aggregate_grads(mixture, sums, grad_sums, mask), mixture)

    return {"aggregate": aggregate, "aggregate_grads": aggregate_grads}


def register(implementation: Implementation, key: str) -> None:
    """Put an implementation behind fused_elbo's operators, for a dispatch key."""
    for name, kernel in kernels_of(implementation).items():
        registry.implement(name, kernel, key)
