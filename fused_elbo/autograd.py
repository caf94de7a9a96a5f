"""The loss as a torch.autograd.Function around the operators.

Two classes share one backward. functorch (vmap, torch.func.grad) demands a forward without ctx and a separate
`setup_context`; that style costs about 27 µs more per call than the plain one, so it is used only when it is needed.

torch.compile and torch.export see neither class, but one operator that applies it under the dispatcher: what Dynamo
makes of an autograd.Function has been wrong for arguments that are one tensor (torch 2.11, 2.12), and is wrong or fails
for torch.func's transforms around it. Those they see as plain PyTorch: no operator of ours is differentiable there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from . import backends, ops, reference, tracing

# apply()'s arguments: seven tensors of `ops._INPUTS`, beta, capacity; then the plain values as one tuple, since each
# argument of apply costs time; then the backend.
_TENSORS = 9
_BETA = 7


def elbo(*args: Any) -> tuple[Tensor, ...]:
    """(loss, distortion, rate, sigma, …), differentiable, for what `arguments.of_forward` returns."""
    if plain():
        return reference.forward(*args[:-1], *args[-1])
    if torch.compiler.is_compiling():
        return _operator(*args[:-1], *args[-1], backends.forced)
    function = _FunctorchElbo if torch._C._are_functorch_transforms_active() else _Elbo
    return cast(Any, function).apply(*args, backends.forced)


def plain() -> bool:
    """Whether the loss is made of PyTorch's own operators, which all tracers and transforms see through."""
    if tracing.transforms_traced():
        return True
    transformed, compiling = torch._C._are_functorch_transforms_active(), torch.compiler.is_compiling()
    return backends.forced == "reference" and (transformed or compiling)


def elbo_backward(
    *args: Any, grad_scale: tuple[Tensor | None, float], retain_graph: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, distortion, rate, sigma), detached, after the backward of grad_scale · loss."""
    refuse_backward(args)
    scale, number = grad_scale
    outputs = cast(Any, _Step).apply(*args[:-1], scale, (*args[-1], number), backends.forced)
    loss = outputs[0].detach()
    # _Step has the gradients and looks at no grad_output: any tensor of the loss's shape spares a launch of ones.
    torch.autograd.backward(outputs[0], loss, retain_graph=retain_graph)
    return (loss, *outputs[1:])


def refuse_backward(args: tuple[Any, ...]) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("decoupled_elbo_backward calls backward, which torch.func forbids: use decoupled_elbo there")
    if not torch.is_grad_enabled():
        raise RuntimeError("decoupled_elbo_backward: gradients are off here (torch.no_grad or inference_mode)")
    if not any(t is not None and t.requires_grad for t in args[: _BETA + 1]):
        raise RuntimeError("decoupled_elbo_backward: none of the tensors requires a gradient")


def implementation(backend: str | None, tensors: Sequence[Tensor | None]) -> Any:
    """Whose forward and grads to call: the operators, or those of a forced backend that is not behind them."""
    if backend is None:
        return ops
    first = tensors[0] if tensors[0] is not None else tensors[2]  # recon, or mu where there are no data
    if backend == backends.dispatched.get(cast(Tensor, first).device.type):
        return ops
    if backend in ("triton", "cuda"):
        return getattr(backends, backend).operators()
    return ops.ByReference


def _mask(needs: tuple[bool, ...]) -> int:
    """Bit i for a gradient of the i-th tensor."""
    a, b, c, d, e, f, g, h, *_ = needs
    return a | b << 1 | c << 2 | d << 3 | e << 4 | f << 5 | g << 6 | h << 7


def refuse_forward_mode() -> NoReturn:
    raise NotImplementedError(
        "fused_elbo has no forward-mode derivative (jvp, jacfwd, hessian): use torch.func.jacrev, for a Hessian "
        'jacrev(jacrev(f)), or the transforms of torch.func inside `with fused_elbo.backend("reference"):`'
    )


class Shared(torch.autograd.Function):
    @staticmethod
    def _forward(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        *tensors, values, backend = args
        return implementation(backend, tensors).forward(*tensors, *values)

    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], stats: Tensor) -> None:
        ctx.save_for_backward(*args[:_TENSORS], stats)
        ctx.values, ctx.backend = args[_TENSORS:]
        ctx.set_materialize_grads(False)  # or each output without a gradient would cost a launch of zeros

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, stats = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        needs, values = ctx.needs_input_grad, ctx.values
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A backward that is itself differentiated: the formulas, with S and KL as functions of the inputs again.
            element = inputs[4] if values[0] == ops.Kind.ELEMENT else None
            of_stats: tuple[Any, ...] = (*inputs[:4], element, *inputs[5:7], values[4])
            stats, grads = reference.stats(*of_stats), ops.grads_by_reference
        else:
            grads = implementation(ctx.backend, inputs).grads
        gradients = grads(*grad_outputs[:3], *inputs, stats, *values, _mask(needs))
        return (*[g if needed else None for g, needed in zip(gradients, needs, strict=False)], None, None, None)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        refuse_forward_mode()


class _Elbo(Shared):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        loss, distortion, rate, sigma, stats = Shared._forward(args)
        Shared.save(ctx, args, stats)
        ctx.mark_non_differentiable(sigma)
        return loss, distortion, rate, sigma


class _FunctorchElbo(Shared):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return Shared._forward(args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        Shared.save(ctx, inputs, output[4])
        ctx.mark_non_differentiable(*output[3:])


class _Step(torch.autograd.Function):
    """Both at once: forward has the gradients of the loss already, and backward hands them on.

    As the gradients of a node they belong to autograd alone, which frees each once it is used; given to
    `torch.autograd.backward` they would stay until the whole backward is over, and be copied into a leaf's `.grad`.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, values, backend = args
        ctx.needs = ctx.needs_input_grad
        outputs = implementation(backend, tensors).step(*tensors, *values, _mask(ctx.needs))
        ctx.gradients = outputs[4:]
        ctx.mark_non_differentiable(*outputs[1:4])
        ctx.set_materialize_grads(False)
        return tuple(outputs[:4])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (*[g if needed else None for g, needed in zip(gradients, ctx.needs, strict=False)], *[None] * 4)


ops._library.define(
    f"elbo({ops._INPUTS}, {ops._KNOBS}, {ops._VALUES}, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = torch.ops.fused_elbo.elbo.default


@torch.library.register_fake("fused_elbo::elbo", lib=ops._library)
def _elbo_fake(*args: Any) -> tuple[Tensor, ...]:
    return ops._forward_fake(*args[:-1])[:4]


def _differentiable(*args: Any) -> tuple[Tensor, ...]:
    if torch._C._are_functorch_transforms_active():  # around an exported program: as in plain()
        return reference.forward(*args[:-1])[:4]
    return cast(Any, _Elbo).apply(*args[:_TENSORS], args[_TENSORS:-1], args[-1])


def _without_gradients(*args: Any) -> tuple[Tensor, ...]:
    return implementation(args[-1], args[:_TENSORS]).forward(*args[:-1])[:4]


ops._library.impl("elbo", _differentiable, "Autograd")
ops._library.impl("elbo", _without_gradients, "CompositeExplicitAutograd")
torch.library.register_vmap("fused_elbo::elbo", ops.vmap_rule(_operator), lib=ops._library)
