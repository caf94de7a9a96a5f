"""The rates of a hierarchy's levels, summed: two operators for any number of levels, and their autograd node.

A hierarchical VAE has tens of levels, most of them so small that a node of autograd's, two operators and the start of
the threads cost more than their arithmetic.

    levels        Σ over the levels of max(KL, free_bits), [B]
    levels_grads  the gradients, for the tensors whose places in `tensors` are `wanted`
    rates         levels with its autograd node: what torch.compile and torch.export see, as `autograd`'s elbo

`tensors` has four for each level: mu, logvar, prior_mu, prior_logvar; the last two may be absent together. The C++
library has kernels for both operators. Every other backend is asked for level after level, with what `ops` has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import arguments, autograd, backends, checks, distributed, ops, reference, tracing
from .sigma import Kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SCHEMAS = {
    "levels": "(Tensor?[] tensors, float free_bits) -> Tensor",
    "levels_grads": "(Tensor grad, Tensor?[] tensors, float free_bits, int[] wanted) -> Tensor[]",
    "rates": "(Tensor?[] tensors, float free_bits, str? backend) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    ops._library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

_Tensors = Sequence[Tensor | None]


@torch.library.register_fake("fused_elbo::levels", lib=ops._library)
def _levels_fake(tensors, free_bits):
    return tensors[0].new_empty(tensors[0].shape[0], dtype=reference.compute_dtype(*tensors))


@torch.library.register_fake("fused_elbo::levels_grads", lib=ops._library)
def _levels_grads_fake(grad, tensors, free_bits, wanted):
    return [torch.empty_like(tensors[i]) for i in wanted]


@torch.library.register_fake("fused_elbo::rates", lib=ops._library)
def _rates_fake(tensors, free_bits, backend):
    return _levels_fake(tensors, free_bits)


def _each(tensors: _Tensors) -> Iterator[_Tensors]:
    """The seven inputs of `ops` for each level."""
    for i in range(0, len(tensors), 4):
        mu, logvar, prior_mu, prior_logvar = tensors[i : i + 4]
        yield None, None, mu, logvar, None, prior_mu, prior_logvar


class OneByOne:
    """Both operators as calls of others for each level: `by` has the functions of `ops`."""

    def __init__(self, by: Any) -> None:
        self.by = by

    def levels(self, tensors: _Tensors, free_bits: float) -> Tensor:
        dtype = reference.compute_dtype(*tensors)
        rates = [self.by.stats(*inputs, free_bits)[2, :-1] for inputs in _each(tensors)]
        return torch.stack([rate.to(dtype) for rate in rates]).sum(0)

    def levels_grads(self, grad: Tensor, tensors: _Tensors, free_bits: float, wanted: Sequence[int]) -> list[Tensor]:
        values = (int(Kind.GIVEN), False, 0.0, 0.0, free_bits, 1.0, None, reference.NONE)
        found: list[Tensor] = []
        for level, inputs in enumerate(_each(tensors)):
            own = grad.to(reference.compute_dtype(*inputs))
            stats = own.new_zeros(3, own.shape[0] + 1)  # of no account where β is a number and there are no data
            bits = [(2, 3, 5, 6)[i % 4] for i in wanted if i // 4 == level]  # among `ops._INPUTS`
            mask = sum(1 << bit for bit in bits)
            gradients = self.by.grads(own, None, None, *inputs, None, None, stats, *values, mask)
            found += [gradients[bit] for bit in bits]
        return found


def _default(name: str) -> Callable[..., Any]:
    """Until the C++ library is loaded, and for ever on devices that it does not serve."""

    def implementation(*args: Any) -> Any:
        device = args[name == "levels_grads"][0].device.type
        native = backends.dispatched.get(device) == "cpp" and backends.load_for(device)
        return globals()[name](*args) if native else getattr(OneByOne(ops), name)(*args)

    return implementation


levels = torch.ops.fused_elbo.levels.default
levels_grads = torch.ops.fused_elbo.levels_grads.default
_operators = SimpleNamespace(levels=levels, levels_grads=levels_grads)
_by_reference = OneByOne(ops.ByReference)
for _name in ("levels", "levels_grads"):
    ops._library.impl(_name, _default(_name), "CompositeExplicitAutograd")
    torch.library.register_vmap(f"fused_elbo::{_name}", ops.vmap_rule(globals()[_name]), lib=ops._library)


class _Levels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, free_bits: float, backend: str | None, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.free_bits, ctx.backend = free_bits, backend
        return _implementation(backend, tensors).levels(tensors, free_bits)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        wanted = [i for i, needed in enumerate(needs) if needed]
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # a backward that is differentiated
        by = _by_reference if twice else _implementation(ctx.backend, tensors)
        if tracing.of_grads_batched(grad_outputs[0]):
            by = OneByOne(autograd.implementation(ctx.backend, (None, None, tensors[0])))
        gradients = iter(by.levels_grads(grad_outputs[0], tensors, ctx.free_bits, wanted))
        return (None, None, *[next(gradients) if needed else None for needed in needs])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        autograd.refuse_forward_mode()


def _differentiable(tensors: _Tensors, free_bits: float, backend: str | None) -> Tensor:
    if torch._C._are_functorch_transforms_active():  # as autograd's
        return _by_reference.levels(tensors, free_bits)
    return cast(Any, _Levels).apply(free_bits, backend, *tensors)


def _without_gradients(tensors: _Tensors, free_bits: float, backend: str | None) -> Tensor:
    return _implementation(backend, tensors).levels(tensors, free_bits)


_rates_operator = torch.ops.fused_elbo.rates.default
ops._library.impl("rates", _differentiable, "Autograd")
ops._library.impl("rates", _without_gradients, "CompositeExplicitAutograd")
torch.library.register_vmap("fused_elbo::rates", ops.vmap_rule(_rates_operator), lib=ops._library)


def _implementation(backend: str | None, tensors: _Tensors) -> Any:
    by = autograd.implementation(backend, (None, None, tensors[0]))
    return _operators if by is ops else OneByOne(by)


def rate(
    mu: Any, logvar: Any, prior: Any, free_bits: float, reduction: str, process_group: ProcessGroup | None
) -> Tensor:
    """`gaussian_kl` of lists, or of what a user takes for them."""
    levels = arguments.of_levels(mu, logvar, prior, process_group is not None)
    index = checks.reduction(reduction)
    checks.number("free_bits", free_bits, 0)
    latents = sum(level[0].shape[1:].numel() for level in levels)
    if process_group is not None:
        each = "batchmean" if reduction == "mean" else reduction
        calls = [_arguments(level, free_bits, each) for level in levels]
        total = torch.stack([distributed.elbo(*args, process_group=process_group)[0] for args in calls]).sum()
        return total / latents if reduction == "mean" else total
    rates = _rates(levels, float(free_bits))
    if reduction == "none":
        return rates
    return rates.sum() * reference.reduction_weight(index, rates.shape[0], latents)


def _rates(each: Sequence[_Tensors], free_bits: float) -> Tensor:
    """Σ over the levels of max(KL, free_bits), [B], differentiable."""
    tensors = [t for level in each for t in level]
    if autograd.plain():
        return _by_reference.levels(tensors, free_bits)
    dtype = reference.compute_dtype(*tensors)
    if torch._C._are_functorch_transforms_active():  # which would need a node of another style, and rules for lists
        return torch.stack([autograd.elbo(*_arguments(l, free_bits, "none"))[0].to(dtype) for l in each]).sum(0)
    if torch.compiler.is_compiling():
        return _rates_operator(tensors, free_bits, backends.forced)
    return cast(Any, _Levels).apply(free_bits, backends.forced, *tensors)


def _arguments(level: _Tensors, free_bits: float, reduction: str) -> tuple[Any, ...]:
    return arguments.of_forward((None, None, *level), free_bits=free_bits, reduction=reduction)
