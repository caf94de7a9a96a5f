"""The loss as a torch.autograd.Function around the operators.

Two classes share one backward. functorch (vmap, torch.func.grad) demands a forward without ctx and a separate
`setup_context`; that style costs about 27 µs more per call than the plain one, so it is used only when it is needed.

torch.compile and torch.export see neither class, but one operator that applies it under the dispatcher: what Dynamo
makes of an autograd.Function has been wrong for arguments that are one tensor (torch 2.11, 2.12), and is wrong or fails
for torch.func's transforms around it. Those they see as plain PyTorch: no operator of ours is differentiable there.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from . import backends, reference, tracing
from .call import GradOutputs, Options, Tensors, mask_of
from .dispatch import nearest
from .operators import registry

_TENSORS = len(Tensors._fields)
_operator = registry.find("elbo")


def elbo(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
    """(loss, distortion, rate, sigma, …), differentiable."""
    compiling, transformed = torch.compiler.is_compiling(), torch._C._are_functorch_transforms_active()
    if not compiling and not transformed:
        return cast(Any, _Elbo).apply(*tensors, options, backends.forced)
    if plain():
        return reference.forward(tensors, options)
    if compiling:
        return _operator(*tensors, *options, backends.forced)
    return cast(Any, _FunctorchElbo).apply(*tensors, options, backends.forced)


def plain() -> bool:
    """Whether the loss is made of PyTorch's own operators, which all tracers and transforms see through."""
    if tracing.transforms_traced():
        return True
    transformed, compiling = torch._C._are_functorch_transforms_active(), torch.compiler.is_compiling()
    return backends.forced == "reference" and (transformed or compiling)


def elbo_backward(
    tensors: Tensors, options: Options, *, grad_scale: tuple[Tensor | None, float], retain_graph: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, distortion, rate, sigma), detached, after the backward of grad_scale · loss."""
    refuse_backward(tensors)
    outputs = cast(Any, _Step).apply(*tensors, options, backends.forced, *grad_scale)
    loss = outputs[0].detach()
    # _Step has the gradients and looks at no grad_output: any tensor of the loss's shape spares a launch of ones.
    torch.autograd.backward(outputs[0], loss, retain_graph=retain_graph)
    return (loss, *outputs[1:])


def refuse_backward(tensors: Tensors) -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("decoupled_elbo_backward calls backward, which torch.func forbids: use decoupled_elbo there")
    if not torch.is_grad_enabled():
        raise RuntimeError("decoupled_elbo_backward: gradients are off here (torch.no_grad or inference_mode)")
    if not any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("decoupled_elbo_backward: none of the tensors requires a gradient")


def refuse_forward_mode() -> NoReturn:
    raise NotImplementedError(
        "fused_elbo has no forward-mode derivative (jvp, jacfwd, hessian): use torch.func.jacrev, for a Hessian "
        'jacrev(jacrev(f)), or the transforms of torch.func inside `with fused_elbo.backend("reference"):`'
    )


def for_inputs(gradients: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """What a Function's backward returns: a gradient, or None, for each argument of its apply."""
    rest = (None,) * (len(needs) - len(gradients))
    return (*[g if needed else None for g, needed in zip(gradients, needs, strict=False)], *rest)


class ElboFunction(torch.autograd.Function):
    """What the Functions of the loss have in common. Arguments of apply: the tensors of a call, its options as one
    argument, since each costs time, the backend, and what a subclass adds."""

    @staticmethod
    def compute(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        tensors, (options, backend) = Tensors._make(args[:_TENSORS]), args[_TENSORS:]
        return nearest(backend, tensors).forward(tensors, options)

    @staticmethod
    def save(ctx: Any, args: tuple[Any, ...], stats: Tensor) -> None:
        ctx.save_for_backward(*args[:_TENSORS], stats)
        ctx.options, ctx.backend = args[_TENSORS:]
        ctx.set_materialize_grads(False)  # or each output without a gradient would cost a launch of zeros

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, stats = ctx.saved_tensors  # once: activation checkpointing recomputes at each access
        tensors, needs, given = Tensors._make(inputs), ctx.needs_input_grad, GradOutputs(*grad_outputs[:3])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A backward that is itself differentiated: the formulas, with A and KL as functions of the inputs again.
            by, stats = reference, reference.stats(tensors, ctx.options)
        else:
            by = nearest(ctx.backend, tensors, stats, *given)
        gradients = by.grads(tensors, ctx.options, stats, given, mask_of(needs))
        return for_inputs(gradients, needs)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        refuse_forward_mode()


class _Elbo(ElboFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        loss, distortion, rate, sigma, stats = ElboFunction.compute(args)
        ElboFunction.save(ctx, args, stats)
        ctx.mark_non_differentiable(sigma)
        return loss, distortion, rate, sigma


class _FunctorchElbo(ElboFunction):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ElboFunction.compute(args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ElboFunction.save(ctx, inputs, output[4])
        ctx.mark_non_differentiable(*output[3:])


class _Step(torch.autograd.Function):
    """Both at once: forward has the gradients of the loss already, and backward hands them on.

    As the gradients of a node they belong to autograd alone, which frees each once it is used; given to
    `torch.autograd.backward` they would stay until the whole backward is over, and be copied into a leaf's `.grad`.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        tensors, (options, backend, scale, number) = Tensors._make(args[:_TENSORS]), args[_TENSORS:]
        ctx.needs = ctx.needs_input_grad
        outputs = nearest(backend, tensors, scale).step(tensors, options, scale, number, mask_of(ctx.needs))
        ctx.gradients = outputs[4:]
        ctx.mark_non_differentiable(*outputs[1:4])
        ctx.set_materialize_grads(False)
        return cast(tuple[Tensor, ...], outputs[:4])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return for_inputs(gradients, ctx.needs)


def _differentiable(*args: Any) -> tuple[Tensor, ...]:
    tensors, options, backend = Tensors._make(args[:_TENSORS]), Options._make(args[_TENSORS:-1]), args[-1]
    if torch._C._are_functorch_transforms_active():  # around an exported program: as in plain()
        return reference.forward(tensors, options)[:4]
    return cast(Any, _Elbo).apply(*tensors, options, backend)


def _without_gradients(*args: Any) -> tuple[Tensor, ...]:
    return ElboFunction.compute((*args[:_TENSORS], Options._make(args[_TENSORS:-1]), args[-1]))[:4]


registry.implement("elbo", _differentiable, "Autograd")
registry.implement("elbo", _without_gradients, "CompositeExplicitAutograd")
