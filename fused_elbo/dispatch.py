"""Who serves a call: PyTorch's dispatcher by device, or the backend that was asked for; and what happens before a
device's kernels are loaded, or where there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, reference, tracing
from .call import LATENTS, NONE, Gradients, GradOutputs, Options, Tensors, compute_dtype, first, mask_of
from .operators import aggregate, elbo, levels, registry
from .operators.elbo import Implementation

operators = elbo.Operators()
_of_levels, _of_aggregate = levels.Operators(), aggregate.Operators()


def implementation(backend: str | None, tensors: Tensors) -> Implementation:
    """Whose functions to call: the operators, or those of a forced backend that is not behind them."""
    if backend is None or backend == backends.dispatched.get(first(tensors).device.type):
        return operators
    if backend in ("triton", "cuda"):
        return getattr(backends, backend).operators()
    return reference


def nearest(backend: str | None, tensors: Tensors, *others: Tensor | None) -> Implementation:
    """The same, for a call with gradients off. Where kernels that are Python functions stand behind the operators, and
    nothing stands between (`others`: the tensors that the call has besides), they are called past PyTorch's dispatcher,
    whose way from Python to C++ and back to Python takes as long as they do."""
    by = implementation(backend, tensors)
    if by is operators and elbo.in_python:
        x = first(tensors)
        # A device's type, as a new string, would take as long to get as all that `is_straight` asks of a tensor.
        kernels = elbo.in_python.get("cuda" if x.is_cuda else "cpu" if x.is_cpu else "")
        if kernels is not None and tracing.is_straight((*tensors, *others)):
            return kernels
    return by


def levels_implementation(backend: str | None, mu: Tensor) -> levels.Implementation:
    """The same for the operators of a hierarchy's levels."""
    by = implementation(backend, Tensors(mu=mu))
    if by is operators:
        return _of_levels
    return OneByOne(reference) if by is reference else getattr(backends, str(backend)).levels_operators()


def aggregate_implementation(backend: str | None, z: Tensor) -> aggregate.Implementation:
    """The same for the operators of the aggregate posterior."""
    by = implementation(backend, Tensors(mu=z))
    if by is operators:
        return _of_aggregate
    return reference.aggregate if by is reference else getattr(backends, str(backend)).aggregate_operators()


class OneByOne:
    """The operators of the levels, as calls of `by` for each level."""

    def __init__(self, by: Implementation) -> None:
        self.by = by

    def levels(self, tensors: Sequence[Tensor | None], free_bits: float, per_level: bool) -> Tensor:
        dtype, options = compute_dtype(*tensors), Options(free_bits=free_bits, reduction=NONE)
        rates = [self.by.stats(level, options)[2, :-1].to(dtype) for level in self._each(tensors)]
        return torch.stack(rates, 1) if per_level else torch.stack(rates).sum(0)

    def levels_grads(
        self, tensors: Sequence[Tensor | None], free_bits: float, grad: Tensor, wanted: Sequence[int]
    ) -> list[Tensor]:
        options = Options(free_bits=free_bits, reduction=NONE)
        found: dict[int, Tensor] = {}  # by its place
        for i, level in enumerate(self._each(tensors)):
            own = (grad if grad.dim() == 1 else grad[:, i]).to(compute_dtype(*level))
            stats = own.new_zeros(3, own.shape[0] + 1)  # of no account where β is a number and there are no data
            names = {LATENTS[k % 4]: k for k in wanted if k // 4 == i}
            mask = mask_of(name in names for name in Gradients._fields)
            gradients = Gradients._make(self.by.grads(level, options, stats, GradOutputs(loss=own), mask))
            found |= {k: getattr(gradients, name) for name, k in names.items()}
        return [found[k] for k in wanted]

    def _each(self, tensors: Sequence[Tensor | None]) -> list[Tensors]:
        every = (tensors[i : i + 4] for i in range(0, len(tensors), 4))
        return [Tensors(**dict(zip(LATENTS, latents, strict=True))) for latents in every]


def check_served(x: Tensor) -> None:
    """Refuse tensors that the backend which was asked for does not serve; left alone, the dispatcher finds one."""
    name = backends.forced
    if name is None or name == "reference":
        return
    device = x.device.type
    if name == "cpp" and device != "cpu":
        raise ValueError(f'backend: "cpp" was asked for, which serves CPU tensors, but the tensors are on {x.device}')
    if name == "cuda" and device != backends.cuda.device:
        raise ValueError(f'backend: "cuda" was asked for, which serves CUDA tensors, but the tensors are on {x.device}')
    if tracing.transforms_traced():
        raise ValueError(
            f'backend: "{name}" was asked for, but where torch.func\'s transforms are compiled or exported '
            'the loss is plain PyTorch: ask for "reference", or for none'
        )
    if name == "triton":
        if device not in ("cpu", "cuda"):
            raise ValueError(f'backend: "triton" was asked for, which serves GPU tensors; these are on {x.device}')
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if traced and backends.dispatched[device] != "triton":
            raise ValueError(
                f'backend: "triton" was asked for; for {device} tensors it works neither in torch.compile nor in vmap'
            )
        if not torch.compiler.is_compiling():
            backends.triton.require(device)


def _serve(name: str, otherwise: Callable[..., Any]) -> None:
    """Register an operator's default implementation, which PyTorch calls until a device's kernels are registered.

    It gets them loaded and calls the operator again, which then reaches them; where there are none, it calls
    `otherwise`.
    """
    operator = registry.find(name)

    def default(*args: Any) -> Any:
        device = next(t for t in _flat(args) if isinstance(t, Tensor)).device.type
        return operator(*args) if backends.load_for(device) else otherwise(*args)

    registry.implement(name, default, "CompositeExplicitAutograd")


def _flat(args: Iterable[Any]) -> Iterator[Any]:
    """The arguments, with those of a list one by one."""
    for value in args:
        yield from value if isinstance(value, (list, tuple)) else [value]


for _name, _kernel in (elbo.kernels_of(reference) | aggregate.kernels_of(reference.aggregate)).items():
    _serve(_name, _kernel)
_serve("levels", OneByOne(reference).levels)
_serve("levels_grads", OneByOne(reference).levels_grads)
