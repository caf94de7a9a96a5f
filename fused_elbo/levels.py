"""The rates of a hierarchy's levels, summed or each: `gaussian_kl` of lists, as one autograd node for all levels.

A hierarchical VAE has tens of levels, most of them so small that a node of autograd's, two operators and the start of
the threads, or the launches, cost more than their arithmetic. So the backends have kernels for many levels at once
(operators/levels.py); the reference goes level after level (dispatch.OneByOne).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import arguments, autograd, backends, checks, distributed, reference, tracing
from .call import Tensors, compute_dtype
from .dispatch import OneByOne, implementation, levels_implementation
from .operators import registry
from .reference.math import reduction_weight

_by_reference = OneByOne(reference)
_operator = registry.find("rates")


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, free_bits: float, per_level: bool, backend: str | None, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.free_bits, ctx.backend = free_bits, backend
        return levels_implementation(backend, cast(Tensor, tensors[0])).levels(tensors, free_bits, per_level)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        wanted = [i for i, needed in enumerate(needs) if needed]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a backward that is itself differentiated
            by = _by_reference
        elif tracing.of_grads_batched(grad_outputs[0]):
            by = OneByOne(implementation(ctx.backend, Tensors(mu=tensors[0])))
        else:
            by = levels_implementation(ctx.backend, tensors[0])
        gradients = iter(by.levels_grads(tensors, ctx.free_bits, grad_outputs[0], wanted))
        return (None, None, None, *[next(gradients) if needed else None for needed in needs])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        autograd.refuse_forward_mode()


def _differentiable(tensors: Sequence[Tensor | None], free_bits: float, per_level: bool, backend: str | None) -> Tensor:
    if torch._C._are_functorch_transforms_active():  # as autograd's
        return _by_reference.levels(tensors, free_bits, per_level)
    return cast(Any, _Levels).apply(free_bits, per_level, backend, *tensors)


def _without_gradients(
    tensors: Sequence[Tensor | None], free_bits: float, per_level: bool, backend: str | None
) -> Tensor:
    return levels_implementation(backend, cast(Tensor, tensors[0])).levels(tensors, free_bits, per_level)


registry.implement("rates", _differentiable, "Autograd")
registry.implement("rates", _without_gradients, "CompositeExplicitAutograd")


def rate(mu: Any, logvar: Any, prior: Any, per_level: bool, options: Mapping[str, Any]) -> Tensor:
    """`gaussian_kl` of lists, or of what a user takes for them."""
    group, reduction = options["process_group"], options["reduction"]
    levels = arguments.levels(mu, logvar, prior, group is not None)
    index = checks.reduction(reduction)
    checks.numbers(options)
    checks.of_one_level(options)
    latents = sum(cast(Tensor, level[0]).shape[1:].numel() for level in levels)
    if group is not None:
        of_each = {**options, "reduction": "batchmean" if reduction == "mean" else reduction}
        calls = [arguments.level(level, of_each) for level in levels]
        each = torch.stack([distributed.elbo(*call, process_group=group)[0] for call in calls])
        found = each if per_level else each.sum()
        return found / latents if reduction == "mean" else found
    rates = _rates(levels, per_level, options)
    if reduction == "none":
        return rates
    return (rates.sum(0) if per_level else rates.sum()) * reduction_weight(index, rates.shape[0], latents)


def _rates(levels: Sequence[Sequence[Tensor | None]], per_level: bool, options: Mapping[str, Any]) -> Tensor:
    """As the operator, differentiable."""
    tensors, free_bits = [t for level in levels for t in level], float(options["free_bits"])
    if autograd.plain():
        return _by_reference.levels(tensors, free_bits, per_level)
    if torch._C._are_functorch_transforms_active():  # which would need a node of another style, and rules for lists
        dtype, of_each = compute_dtype(*tensors), {**options, "reduction": "none"}
        each = [autograd.elbo(*arguments.level(l, of_each))[0].to(dtype) for l in levels]
        return torch.stack(each, 1) if per_level else torch.stack(each).sum(0)
    if torch.compiler.is_compiling():
        return _operator(tensors, free_bits, per_level, backends.forced)
    return cast(Any, _Levels).apply(free_bits, per_level, backends.forced, *tensors)
