"""Kernels that are Python functions are called past PyTorch's dispatcher, but only where nobody could tell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_elbo import autograd, decoupled_elbo, decoupled_elbo_backward, dispatch, reference
from fused_elbo.operators import elbo


class Python:
    """The reference, as if it had been registered for CPU tensors."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.called.append(name)
            return getattr(reference, name)(*args)

        return call


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Python:
    kernels = Python()
    monkeypatch.setitem(elbo.in_python, "cpu", kernels)
    return kernels


def given() -> list[Tensor]:
    return [torch.linspace(i, i + 1, 6).reshape(2, 3).requires_grad_(i != 1) for i in range(4)]


def loss(*tensors: Tensor) -> Tensor:
    return decoupled_elbo(*tensors).loss


def gradients(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*tensors), [t for t in tensors if t.requires_grad])


def test_where_nobody_could_tell(python: Python) -> None:
    plain = gradients(given())
    decoupled_elbo_backward(*given(), grad_scale=torch.ones(()))
    parameters = [torch.nn.Parameter(t.detach(), t.requires_grad) for t in given()]
    with torch.autocast("cpu", torch.bfloat16):
        gradients(parameters)
    with torch.no_grad():
        loss(*given())
    with torch.inference_mode():
        loss(*given())
    assert python.called == ["forward", "grads", "step", "forward", "grads", "forward", "forward"]
    elbo.in_python.clear()
    for a, b in zip(plain, gradients(given()), strict=True):
        torch.testing.assert_close(a, b)


def test_none_in_the_place_of_a_gradient(python: Python) -> None:
    """Which an operator does not return, but a backend may."""
    kernels = elbo.kernels_of(python)
    tensors, options = dispatch.Tensors(*[t.detach() for t in given()]), dispatch.Options()
    python.grads = lambda *_: (tensors.recon, *[None] * 7)
    python.step = lambda *_: (*[torch.zeros(())] * 4, tensors.recon, *[None] * 7)
    found = kernels["grads"](*tensors, *options, torch.zeros(3, 3), None, None, None, 1)
    stepped = kernels["step"](*tensors, *options, None, 1.0, 1)[4:]
    for got in (found, stepped):
        assert [tuple(t.shape) for t in got] == [(2, 3), *[(0,)] * 7]
    assert autograd.for_inputs((tensors.recon, None), (True, False, True)) == (tensors.recon, None, None)


class Dispatched(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def profiled(seen: list[str]) -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield
    seen += [str(event.name).replace("::", ".") for event in profile.events()]


@pytest.mark.parametrize("watching", [Dispatched, Functions, profiled])
def test_who_watches_sees_the_operators(watching: Callable[[list[str]], Any], python: Python) -> None:
    seen: list[str] = []
    names = ["forward", "step"]
    with watching(seen):
        value = loss(*given())
        decoupled_elbo_backward(*given())
        if watching is not Functions:  # which is off while it handles torch.autograd.grad
            names += ["grads"]
            value.backward()
    assert not python.called
    for name in names:
        assert any(f"fused_elbo.{name}" in each for each in seen)


@pytest.mark.parametrize(
    "kw", [{}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}], ids=str
)
def test_make_fx_has_the_operators_in_its_graph(kw: dict[str, Any], python: Python) -> None:
    graph = str(make_fx(lambda *tensors: gradients(list(tensors)), **kw)(*given()).graph)
    assert not python.called
    assert "fused_elbo.forward" in graph
    assert "fused_elbo.grads" in graph


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_made_of_the_operators(python: Python) -> None:
    with torch.no_grad():
        traced = torch.jit.trace(loss, tuple(t.detach() for t in given()), check_trace=False)
    assert not python.called
    torch.testing.assert_close(traced(*given()), loss(*given()))


def test_transforms_and_grads_in_batches(python: Python) -> None:
    tensors = given()
    value = loss(*tensors)
    torch.testing.assert_close(torch.vmap(loss)(*[t.detach()[None] for t in tensors]), value[None])
    expected = torch.autograd.grad(value, tensors[0], retain_graph=True)[0]
    torch.testing.assert_close(torch.func.grad(loss)(*[t.detach() for t in tensors]), expected)
    python.called.clear()
    (batched,) = torch.autograd.grad(value, tensors[0], torch.tensor([1.0, 2.0]), is_grads_batched=True)
    assert not python.called
    torch.testing.assert_close(batched[1], 2 * batched[0])


class Named(Tensor):
    pass


class Wrapped(Tensor):
    """Without __torch_function__, and with __torch_dispatch__."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*[a.inner if isinstance(a, Wrapped) else a for a in args], **(kwargs or {}))


def subclass(t: Tensor) -> Tensor:
    return t.as_subclass(Named)


def wrapped(t: Tensor) -> Tensor:
    wrapper = Tensor._make_wrapper_subclass(Wrapped, t.shape, strides=t.stride(), dtype=t.dtype)
    wrapper.inner = t
    return wrapper


def negated_by_a_bit(t: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(t), -t).conj().imag


@pytest.mark.parametrize("like", [subclass, wrapped, negated_by_a_bit])
def test_tensors_that_are_more_than_their_memory(like: Callable[[Tensor], Tensor], python: Python) -> None:
    tensors = [t.detach() for t in given()]
    expected = loss(*tensors)
    python.called.clear()
    for i in range(4):
        special = loss(*[like(t) if k == i else t for k, t in enumerate(tensors)])
        torch.testing.assert_close(special.as_subclass(Tensor), expected)
    assert not python.called


def test_a_grad_output_of_zeros_alone(python: Python) -> None:
    tensors = given()
    value = loss(*tensors)
    python.called.clear()
    (g,) = torch.autograd.grad(value, tensors[0], torch._efficientzerotensor(()))
    assert not python.called
    assert not g.count_nonzero()
