"""The loss as a torch.autograd.Function around the operators.

Two classes share one backward. functorch (vmap, torch.func.grad) demands a forward without ctx and a separate
`setup_context`; that style costs about 27 µs more per call than the plain one, so it is used only when it is needed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import backends, ops, reference

# apply()'s arguments: seven tensors of `ops._INPUTS`, beta, capacity, then the eight plain values, then the backend.
_TENSORS, _VALUES = slice(0, 9), slice(9, 17)
_BETA = 7


def elbo(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, distortion, rate, sigma, stats) for the arguments of `ops.forward`, differentiable."""
    function = _FunctorchElbo if torch._C._are_functorch_transforms_active() else _Elbo
    return cast(Any, function).apply(*args, backends.forced)


def elbo_backward(
    *args: Any, grad_scale: tuple[Tensor | None, float], retain_graph: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, distortion, rate, sigma), detached, after the backward of grad_scale · loss."""
    _refuse_backward(args[: _BETA + 1])
    scale, number = grad_scale
    outputs = cast(Any, _Step).apply(*args[_TENSORS], scale, *args[_VALUES], number, backends.forced)
    loss = outputs[0].detach()
    # _Step has the gradients and looks at no grad_output: any tensor of the loss's shape spares a launch of ones.
    torch.autograd.backward(outputs[0], loss, retain_graph=retain_graph)
    return (loss, *outputs[1:])


def _refuse_backward(inputs: tuple[Tensor | None, ...]) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("decoupled_elbo_backward calls backward, which torch.func forbids: use decoupled_elbo there")
    if not torch.is_grad_enabled():
        raise RuntimeError("decoupled_elbo_backward: gradients are off here (torch.no_grad or inference_mode)")
    if not any(t is not None and t.requires_grad for t in inputs):
        raise RuntimeError("decoupled_elbo_backward: none of the tensors requires a gradient")


def _implementation(backend: str | None, device: str) -> Any:
    """Whose forward and grads to call: the operators, or those of a forced backend that is not behind them."""
    if backend is None or backend == backends.dispatched.get(device):
        return ops
    if backend in ("triton", "cuda"):
        return getattr(backends, backend).operators()
    return ops.ByReference


def _device_of(tensors: tuple[Any, ...]) -> str:
    return (tensors[0] if tensors[0] is not None else tensors[2]).device.type  # recon, or mu where there are no data


class _Shared(torch.autograd.Function):
    @staticmethod
    def _forward(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        *inputs, backend = args
        return _implementation(backend, _device_of(args)).forward(*inputs)

    @staticmethod
    def _save(ctx: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        sigma, stats = output[3:]
        ctx.save_for_backward(*args[_TENSORS], stats)
        ctx.values, ctx.backend = args[_VALUES], args[-1]
        ctx.mark_non_differentiable(sigma, stats)
        ctx.set_materialize_grads(False)  # or each output without a gradient would cost a launch of zeros

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved: tuple[Any, ...] = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        inputs, stats = saved[:-1], saved[-1]
        needs = ctx.needs_input_grad[: _BETA + 1]
        mask = sum(1 << i for i, needed in enumerate(needs) if needed)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A backward that is itself differentiated: the formulas, with S and KL as functions of the inputs again.
            element = inputs[4] if ctx.values[0] == ops.Kind.ELEMENT else None
            of_stats: tuple[Any, ...] = (*inputs[:4], element, *inputs[5:7], ctx.values[4])
            stats, grads = reference.stats(*of_stats), ops.grads_by_reference
        else:
            grads = _implementation(ctx.backend, _device_of(inputs)).grads
        gradients = grads(*grad_outputs[:3], *inputs, stats, *ctx.values, mask)
        return (*(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 10)


class _Elbo(_Shared):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = _Shared._forward(args)
        _Shared._save(ctx, args, output)
        return output


class _FunctorchElbo(_Shared):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _Shared._forward(args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _Shared._save(ctx, inputs, output)


class _Step(torch.autograd.Function):
    """Both at once: forward has the gradients of the loss already, and backward hands them on.

    As the gradients of a node they belong to autograd alone, which frees each once it is used; given to
    `torch.autograd.backward` they would stay until the whole backward is over, and be copied into a leaf's `.grad`.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *operands, backend = args
        ctx.needs = ctx.needs_input_grad[: _BETA + 1]
        mask = sum(1 << i for i, needed in enumerate(ctx.needs) if needed)
        outputs = _implementation(backend, _device_of(args)).step(*operands, mask)
        ctx.gradients = outputs[4:]
        ctx.mark_non_differentiable(*outputs[1:4])
        ctx.set_materialize_grads(False)
        return tuple(outputs[:4])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (*(g if needed else None for g, needed in zip(gradients, ctx.needs, strict=True)), *[None] * 12)
