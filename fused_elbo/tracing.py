"""What can be known while compilers trace the loss and torch.func transforms it, and what they cannot take."""

from __future__ import annotations

import functools
import operator

import torch
from torch import _C, Tensor
from torch._C import DispatchKey, _functorch  # type: ignore[attr-defined]
from torch.autograd import profiler
from torch.nn import Parameter


def known(fact: bool) -> bool:
    """A fact about sizes; False where compiled code learns it as it runs: the size of what a boolean mask selects."""
    if not torch.compiler.is_compiling():
        return fact
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # here, since it imports sympy

    return guard_or_false(fact)


def requires_grad(t: Tensor) -> bool:
    """Under any of torch.func's transforms around this call, the innermost of which hides what the others say."""
    if t.requires_grad or torch.compiler.is_compiling() or not _functorch.is_functorch_wrapped_tensor(t):
        return t.requires_grad
    return requires_grad(_functorch.get_unwrapped(t))


def of_grads_batched(grad: Tensor) -> bool:
    """Whether a backward runs for autograd.grad's is_grads_batched, whose vmap takes no operator that returns lists."""
    return _functorch.is_legacy_batchedtensor(grad)


def _bits(*keys: DispatchKey) -> int:
    return functools.reduce(operator.or_, (_C.DispatchKeySet(key).raw_repr() for key in keys))


# Keys of a thread that stop at no operator of ours.
_USUAL = _bits(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)
_PLAIN = frozenset((Tensor, Parameter))


def is_straight(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether an operator of ours, called with these tensors of a CPU or GPU and gradients off, would run the kernel of
    their device and nothing besides.

    The thread has then no mode, transform or tracer that sees the operator, for all of them are keys of PyTorch's
    dispatcher or modes of __torch_function__, and no profiler that notes it. Outside these, a tensor of no subclass is
    its memory, unless that is to be negated, or there is none because all are zeros. (Its own keys would tell that too,
    in more time than these calls take.)
    """
    if torch.compiler.is_compiling() or profiler._is_profiler_enabled or _C._is_torch_function_mode_enabled():
        return False
    if _C._dispatch_tls_local_include_set().raw_repr() | _USUAL != _USUAL:
        return False
    return not [t for t in tensors if t is not None and (type(t) not in _PLAIN or t.is_neg() or t._is_zerotensor())]


def transforms_traced() -> bool:
    """Whether torch.compile or torch.export trace the loss inside one of torch.func's transforms; refused where the
    graph would be wrong, of make_fx too."""
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        if _exporting() and any(kind != "Vmap" for kind in _transforms()):
            raise RuntimeError(
                "torch.export makes no graph of torch.func.grad, vjp or jacrev that runs, whatever they differentiate: "
                "export the loss alone, or use torch.compile"
            )
        return True
    modes = torch._C._TorchDispatchModeKey
    tracing, fake = (torch._C._get_dispatch_mode(key) for key in (modes.PROXY, modes.FAKE))
    if tracing is not None and fake is not None and fake.shape_env is not None and "Vmap" in _transforms():
        raise RuntimeError(
            "make_fx: inside torch.vmap sizes are numbers, which would stay in the graph in spite of "
            'tracing_mode="symbolic": use tracing_mode="real" or "fake", or torch.compile'
        )
    return False


def _transforms() -> list[str]:
    """Those of torch.func around this call, from the outermost to the innermost: "Vmap", "Grad", "Jvp"."""
    return [interpreter.key().name for interpreter in _functorch.get_interpreter_stack() or ()]


def _exporting() -> bool:
    # Not is_exporting(), of which Dynamo of torch 2.11 makes True in torch.compile too.
    return getattr(torch.compiler, "_is_exporting_flag", False)


# Dynamo calls them as it traces. What torch.compiler.assume_constant_result does, less its import of Dynamo: seconds.
_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]
_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
