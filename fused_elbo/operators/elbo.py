"""The operators of the loss: what autograd and torch.compile see, and the contract of every backend.

    stats      reads the data once                     -> stats [3 or 4, B + 1]
    forward    stats and the O(B) arithmetic after it  -> Outputs
    grads      reads the data again, writes gradients  -> Gradients
    step       forward, and grads of grad_scale·loss   -> loss, distortion, rate, sigma, then Gradients
    elbo       forward with its autograd node: what torch.compile and torch.export see (autograd.py)

What `step` returns differs from what forward and grads do by rounding alone; it exists because a backend that does both
at once can read the data once. Its loss is one number: `reduction` is not "none".

All take a call's `Tensors` and `Options`, flat and in that order, and then what they have besides. Returned numbers
have the compute dtype. `Implementation` has the first four with structures for arguments: that is what backends and the
reference provide, `kernels_of` makes the dispatcher's flat kernels of it, and `Operators` calls the flat ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..call import (
    REDUCTIONS,
    Gradients,
    GradOutputs,
    Options,
    Outputs,
    Tensors,
    compute_dtype,
    first,
    masked,
    returns,
    schema,
    stats_rows,
)
from ..sigma import Kind
from . import registry
from .registry import Operator

_TENSORS, _CALL = len(Tensors._fields), len(Tensors._fields) + len(Options._fields)
_CALL_SCHEMA = f"{schema(Tensors)}, {schema(Options)}"


class Implementation(Protocol):
    """What a backend does, for the tensors that it serves."""

    def stats(self, tensors: Tensors, options: Options) -> Tensor: ...

    def forward(self, tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        """As `Outputs`."""
        ...

    def grads(
        self, tensors: Tensors, options: Options, stats: Tensor, grad_outputs: GradOutputs, mask: int
    ) -> tuple[Tensor | None, ...]:
        """As `Gradients`; what the mask does not ask for may be None."""
        ...

    def step(
        self, tensors: Tensors, options: Options, grad_scale: Tensor | None, grad_scale_value: float, mask: int
    ) -> tuple[Tensor | None, ...]: ...


# ------------------------------------------------------------------------------------------------- shapes (the fakes)


def _stats_fake(*args: Any) -> Tensor:
    tensors = Tensors._make(args[:_TENSORS])
    x = first(tensors)
    return x.new_empty((stats_rows(tensors), x.shape[0] + 1), dtype=compute_dtype(*tensors[:4]))


def _forward_fake(*args: Any) -> Outputs:
    tensors, options = Tensors._make(args[:_TENSORS]), Options._make(args[_TENSORS:_CALL])
    x, dtype = first(tensors), compute_dtype(*tensors[:4])
    reduced = (x.shape[0],) if REDUCTIONS[options.reduction] == "none" else ()
    given = () if tensors.log_sigma is None else tuple(tensors.log_sigma.shape)
    sigma = {Kind.GIVEN: given, Kind.BATCH: (), Kind.IMAGE: (x.shape[0],), Kind.ELEMENT: (0,)}[Kind(options.sigma_mode)]
    shapes: tuple[Any, ...] = (reduced, reduced, reduced, sigma, (stats_rows(tensors), x.shape[0] + 1))
    return Outputs._make(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _grads_fake(*args: Any) -> Gradients:
    tensors, mask = Tensors._make(args[:_TENSORS]), args[-1]
    return masked(Gradients._make(tensors[: len(Gradients._fields)]), mask, torch.empty_like, first(tensors))


def _step_fake(*args: Any) -> tuple[Tensor, ...]:
    return (*_forward_fake(*args)[:4], *_grads_fake(*args))


def _elbo_fake(*args: Any) -> tuple[Tensor, ...]:
    return _forward_fake(*args)[:4]


_OUTPUTS, _GRADIENTS = len(Outputs._fields), len(Gradients._fields)
OPERATORS = (
    Operator("stats", f"({_CALL_SCHEMA}) -> Tensor", _stats_fake),
    Operator("forward", f"({_CALL_SCHEMA}) -> {returns(_OUTPUTS)}", _forward_fake),
    Operator(
        "grads",
        f"({_CALL_SCHEMA}, Tensor stats, {schema(GradOutputs, 'grad_')}, int mask) -> {returns(_GRADIENTS)}",
        _grads_fake,
    ),
    Operator(
        "step",
        f"({_CALL_SCHEMA}, Tensor? grad_scale, float grad_scale_value, int mask) -> {returns(4 + _GRADIENTS)}",
        _step_fake,
    ),
)
AUTOGRAD = Operator("elbo", f"({_CALL_SCHEMA}, str? backend) -> {returns(4)}", _elbo_fake)
NAMES = tuple(operator.name for operator in OPERATORS)

registry.define((*OPERATORS, AUTOGRAD))


# --------------------------------------------------------------------------------- from structures to flat, and back


class Operators:
    """The operators of a namespace, called with structures; PyTorch's dispatcher finds who serves the tensors."""

    def __init__(self, namespace: str = "fused_elbo") -> None:
        self._stats, self._forward, self._grads, self._step = (registry.find(name, namespace) for name in NAMES)

    def stats(self, tensors: Tensors, options: Options) -> Tensor:
        return self._stats(*tensors, *options)

    def forward(self, tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
        return self._forward(*tensors, *options)

    def grads(
        self, tensors: Tensors, options: Options, stats: Tensor, grad_outputs: GradOutputs, mask: int
    ) -> tuple[Tensor, ...]:
        return self._grads(*tensors, *options, stats, *grad_outputs, mask)

    def step(
        self, tensors: Tensors, options: Options, grad_scale: Tensor | None, grad_scale_value: float, mask: int
    ) -> tuple[Tensor, ...]:
        return self._step(*tensors, *options, grad_scale, grad_scale_value, mask)


def kernels_of(implementation: Implementation) -> dict[str, Callable[..., Any]]:
    """Flat kernels, by the operators' names."""

    def call(args: tuple[Any, ...]) -> tuple[Tensors, Options]:
        return Tensors._make(args[:_TENSORS]), Options._make(args[_TENSORS:_CALL])

    def present(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
        return tuple([like.new_empty(0, dtype=torch.float32) if t is None else t for t in results])

    def stats(*args: Any) -> Tensor:
        return implementation.stats(*call(args))

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return implementation.forward(*call(args))

    def grads(*args: Any) -> tuple[Tensor, ...]:
        stats, *grad_outputs, mask = args[_CALL:]
        return present(implementation.grads(*call(args), stats, GradOutputs._make(grad_outputs), mask), stats)

    def step(*args: Any) -> tuple[Tensor, ...]:
        outputs = implementation.step(*call(args), *args[_CALL:])
        return present(outputs, cast(Tensor, outputs[0]))

    return {"stats": stats, "forward": forward, "grads": grads, "step": step}


in_python: dict[str, Implementation] = {}  # by type of device: what `register` has put behind its operators


def register(implementation: Implementation, key: str) -> None:
    """Put an implementation behind fused_elbo's operators, for a dispatch key."""
    in_python[key.lower()] = implementation
    for name, kernel in kernels_of(implementation).items():
        registry.implement(name, kernel, key)
